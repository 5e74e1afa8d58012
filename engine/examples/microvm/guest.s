# The guest: 64-bit code without an operating system. It runs wherever it is copied to.
#
#     fill(i)        for every page i
#     say "filled", ask for a pause         the snapshot is taken here
#     say "goes on"
#     check xmm7                            did the vector registers come back?
#     invert(i) if i % 4 == 0; check(i)     for every page i, shuffled
#     say "verified", ask for a pause       a child of that snapshot can be taken here
#     check(i)                              for every page i, in order
#     say "verified again"
#     end
#
# invert(i) complements the first word of a page that was not read before: if a restore installs the
# page later nevertheless, the second check notices it.
#
# A page has 512 words. The first follows from the page's address and the seed, each other one from
# the one before: word * factor + step. Three bits of the hash determine the kind of page:
#
#     0      zeros        word 0
#     1      a fill       factor 1, step 0
#     2..4   counting     factor 1, step 1: compresses well
#     5..7   noise        a linear congruential generator: does not compress
#
# In addition, every fourth 2 MiB are zeros.
#
# Registers set by the launcher, which nothing below changes:
#
#     r12  seed           r13  pages to fill         r14  how many of them are below the gap
#     rsp  a stack
#
# r15 counts pages. Nothing interrupts this code. It runs with user privileges plus access to ports.
# It needs no more, and where the processor doesn't support KVM, such code runs at full speed while
# privileged code is emulated.

    .pushsection .rodata.microvm_guest, "a"
    .globl  microvm_guest_start
    .globl  microvm_guest_end

microvm_guest_start:
    xor     r15d, r15d
2:  mov     rax, r15
    call    guest_page_address
    call    guest_page_pattern
    mov     ecx, 512
3:  stosq
    imul    rax, r8
    add     rax, r9
    dec     ecx
    jnz     3b
    inc     r15
    cmp     r15, r13
    jb      2b

    movq    xmm7, r12
    lea     rsi, [rip + guest_text_filled]
    call    guest_say_pages
    mov     al, {PAUSE}
    out     {REQUEST}, al

    # Possibly in another process, on another day.
    lea     rsi, [rip + guest_text_goes_on]
    call    guest_say
    movq    rax, xmm7
    cmp     rax, r12
    jne     guest_lost

    # Shuffled: i * STRIDE modulo the number of pages, which is smaller than the prime STRIDE.
    xor     r15d, r15d
2:  mov     rax, r15
    mov     ecx, {STRIDE}
    mul     rcx
    div     r13
    mov     rax, rdx
    call    guest_is_inverted
    call    guest_page_address
    test    rbx, rbx
    jz      3f
    not     qword ptr [rdi]
3:  call    guest_check
    inc     r15
    cmp     r15, r13
    jb      2b
    lea     rsi, [rip + guest_text_verified]
    call    guest_say_pages
    mov     al, {PAUSE}
    out     {REQUEST}, al

    xor     r15d, r15d
2:  mov     rax, r15
    call    guest_is_inverted
    call    guest_page_address
    call    guest_check
    inc     r15
    cmp     r15, r13
    jb      2b
    lea     rsi, [rip + guest_text_again]
    call    guest_say_pages
    mov     al, {GOOD}
    jmp     guest_end

guest_lost:
    lea     rsi, [rip + guest_text_lost]
    call    guest_say
    mov     al, {BAD}
    jmp     guest_end

# rdi: the address of the wrong word.
guest_wrong:
    lea     rsi, [rip + guest_text_wrong]
    call    guest_say
    mov     rax, rdi
    mov     ecx, 16
    call    guest_say_number
    lea     rsi, [rip + guest_text_newline]
    call    guest_say
    mov     al, {BAD}

# al: the result.
guest_end:
    out     {REQUEST}, al
2:  pause
    jmp     2b

# rax: number of a page -> rdi: its address. Changes rcx.
guest_page_address:
    mov     rdi, rax
    shl     rdi, 12
    cmp     rax, r14
    jae     2f
    add     rdi, {LOW_PAGES}
    ret
2:  mov     rcx, r14
    shl     rcx, 12
    sub     rdi, rcx
    movabs  rcx, {HIGH_PAGES}
    add     rdi, rcx
    ret

# rax: number of a page -> rbx: all ones if its first word is or will be inverted, else zero.
guest_is_inverted:
    xor     ebx, ebx
    test    al, 3
    jnz     2f
    not     rbx
2:  ret

# rdi: address of a page -> rax: first word, r8: factor, r9: step. Changes rcx.
guest_page_pattern:
    mov     rax, rdi
    xor     rax, r12
    movabs  rcx, 0xbf58476d1ce4e5b9
    imul    rax, rcx
    mov     rcx, rax
    shr     rcx, 32
    xor     rax, rcx
    movabs  rcx, 0x94d049bb133111eb
    imul    rax, rcx
    mov     rcx, rax
    shr     rcx, 29
    xor     rax, rcx
    mov     r8d, 1
    xor     r9d, r9d
    mov     rcx, rdi
    shr     rcx, 21
    not     ecx
    test    cl, 3
    jz      2f
    mov     rcx, rax
    shr     rcx, 61
    jz      2f
    cmp     ecx, 1
    je      3f
    mov     r9d, 1
    cmp     ecx, 5
    jb      3f
    movabs  r8, 6364136223846793005
    movabs  r9, 1442695040888963407
    ret
2:  xor     eax, eax
3:  ret

# rdi: address of a page, rbx: mask of its first word. Doesn't return if the page is wrong.
guest_check:
    call    guest_page_pattern
    mov     rdx, rax
    xor     rdx, rbx
    mov     ecx, 512
2:  cmp     qword ptr [rdi], rdx
    jne     guest_wrong
    imul    rax, r8
    add     rax, r9
    mov     rdx, rax
    add     rdi, 8
    dec     ecx
    jnz     2b
    ret

# rsi: text for what was done -> prints it in a line with the number of pages.
guest_say_pages:
    call    guest_say
    mov     rax, r13
    mov     ecx, 10
    call    guest_say_number
    lea     rsi, [rip + guest_text_pages]

# rsi: text that ends with a zero byte. Changes rdx.
guest_say:
    mov     edx, {SERIAL}
2:  cmp     byte ptr [rsi], 0
    je      3f
    outsb
    jmp     2b
3:  ret

# rax: a number, ecx: the base in which to print it. The digits are collected on the stack.
guest_say_number:
    mov     rsi, rsp
    sub     rsp, 72
    dec     rsi
    mov     byte ptr [rsi], 0
2:  xor     edx, edx
    div     rcx
    add     edx, 48
    cmp     edx, 57
    jbe     3f
    add     edx, 39
3:  dec     rsi
    mov     byte ptr [rsi], dl
    test    rax, rax
    jnz     2b
    call    guest_say
    add     rsp, 72
    ret

guest_text_filled:
    .asciz  "filled "
guest_text_goes_on:
    .asciz  "goes on\n"
guest_text_verified:
    .asciz  "verified "
guest_text_again:
    .asciz  "verified again "
guest_text_pages:
    .asciz  " pages\n"
guest_text_wrong:
    .asciz  "wrong at 0x"
guest_text_newline:
    .asciz  "\n"
guest_text_lost:
    .asciz  "registers are lost\n"

microvm_guest_end:
    .popsection
