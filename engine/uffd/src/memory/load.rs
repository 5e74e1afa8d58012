//! Reads of memory that return an error for an unreadable page: through the kernel, or by loads.
//!
//! ```text
//!   byte(address) ──▶ load: one instruction, and a return
//!                       │ SIGBUS or SIGSEGV with the program counter at `load`
//!                       ▼
//!                     handler ──▶ sets the program counter to `failed`, which returns -1
//!                             ──▶ any other program counter: the action that was set before
//! ```

use std::io::{self, IoSliceMut};

use nix::errno::Errno;
use nix::sys::signal::{SigSet, SigmaskHow, Signal};
use nix::sys::uio::{RemoteIoVec, process_vm_readv};
use nix::unistd::Pid;

use crate::os::SignalMask;
use crate::to_usize;

/// The error for memory of this process that could not be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReadFault {
    /// The page is poisoned, not mapped, or not readable. (Or absent, if the userfaultfd sees only
    /// faults of user code.)
    #[error("memory at {address:#x} cannot be read: poisoned, unmapped or without access")]
    Unreadable {
        /// An address in the first page that can't be read; everything before it was read.
        address: u64,
    },
    /// The system call is not permitted, for example by a filter.
    #[error("process_vm_readv failed")]
    Failed(#[source] io::Error),
}

/// Reads memory of this process through the kernel. Unreadable memory causes an error, not a
/// signal.
///
/// Waits for a page that is missing under a userfaultfd. If the bytes change at the same time, the
/// result is a mixture of old and new bytes, as it would be for another process.
pub fn read_checked(address: u64, buffer: &mut [u8]) -> Result<(), ReadFault> {
    let mut done = 0;
    while done < buffer.len() {
        let from = address.wrapping_add(done as u64);
        let remote = RemoteIoVec {
            base: to_usize(from),
            len: buffer.len() - done,
        };
        // The kernel treats the remote address as data: it checks the mapping and access rights of
        // every page.
        let local = &mut [IoSliceMut::new(&mut buffer[done..])];
        match process_vm_readv(Pid::this(), local, &[remote]) {
            Ok(0) | Err(Errno::EFAULT) => return Err(ReadFault::Unreadable { address: from }),
            // A short read ends at an unreadable page; the next iteration gets the error.
            Ok(bytes) => done += bytes,
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(ReadFault::Failed(errno.into())),
        }
    }
    Ok(())
}

/// Permission for the calling thread to load single bytes of this process's memory.
///
/// A load is a touch like any other: a page that is missing under a userfaultfd raises a fault, and
/// the load waits for it. A page that is poisoned, unmapped or inaccessible causes an error,
/// whereas another load would kill the process by SIGBUS or SIGSEGV.
#[derive(Debug)]
pub struct Loads {
    _mask: SignalMask,
}

impl Loads {
    /// Sets the actions for SIGBUS and SIGSEGV in this process, once, and unblocks both signals in
    /// this thread until the value is dropped.
    pub fn in_this_thread() -> io::Result<Self> {
        catch::install()?;
        let faults = SigSet::from_iter([Signal::SIGBUS, Signal::SIGSEGV]);
        let mask = SignalMask::change(SigmaskHow::SIG_UNBLOCK, &faults)?;
        Ok(Self { _mask: mask })
    }

    /// Loads the byte at `address`.
    pub fn byte(&self, address: u64) -> Result<u8, ReadFault> {
        catch::byte(address)
    }
}

#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
mod catch {
    use std::arch::naked_asm;
    use std::ffi::{c_int, c_void};
    use std::io;
    use std::mem::MaybeUninit;
    use std::sync::OnceLock;

    use nix::errno::Errno;

    use super::ReadFault;

    /// Loads the byte at `address`. The load is the first instruction, and nothing was pushed
    /// before it, so `failed` can return in its place.
    #[cfg(target_arch = "x86_64")]
    #[unsafe(naked)]
    extern "C" fn load(address: u64) -> i32 {
        naked_asm!("movzx eax, byte ptr [rdi]", "ret")
    }

    /// Returns in place of `load` when its load faults.
    #[cfg(target_arch = "x86_64")]
    #[unsafe(naked)]
    extern "C" fn failed() -> i32 {
        naked_asm!("mov eax, -1", "ret")
    }

    #[cfg(target_arch = "aarch64")]
    #[unsafe(naked)]
    extern "C" fn load(address: u64) -> i32 {
        naked_asm!("ldrb w0, [x0]", "ret")
    }

    #[cfg(target_arch = "aarch64")]
    #[unsafe(naked)]
    extern "C" fn failed() -> i32 {
        naked_asm!("mov w0, #-1", "ret")
    }

    /// Loads a byte. Reading memory that others write returns one of the bytes that were there,
    /// because the compiler knows nothing of the load.
    pub(super) fn byte(address: u64) -> Result<u8, ReadFault> {
        u8::try_from(load(address)).map_err(|_| ReadFault::Unreadable { address })
    }

    const CAUGHT: [c_int; 2] = [libc::SIGBUS, libc::SIGSEGV];

    /// The previous actions, in the order of `CAUGHT`.
    static BEFORE: [OnceLock<libc::sigaction>; 2] = [OnceLock::new(), OnceLock::new()];

    pub(super) fn install() -> io::Result<()> {
        static INSTALLED: OnceLock<Result<(), Errno>> = OnceLock::new();
        Ok((*INSTALLED.get_or_init(set_actions))?)
    }

    fn set_actions() -> Result<(), Errno> {
        for (signal, before) in CAUGHT.iter().zip(&BEFORE) {
            let mut found = MaybeUninit::<libc::sigaction>::zeroed();
            // SAFETY: the pointer is to a live sigaction, which the call initialises when it
            // succeeds. The handler can see it before the handler is set.
            unsafe {
                Errno::result(libc::sigaction(
                    *signal,
                    std::ptr::null(),
                    found.as_mut_ptr(),
                ))?;
                before.get_or_init(|| found.assume_init());
            }
            let mut action = MaybeUninit::<libc::sigaction>::zeroed();
            // SAFETY: an action of zeros is valid, with an empty mask. The handler has the type
            // that SA_SIGINFO requires, and does only what is allowed in a handler.
            unsafe {
                let action = action.assume_init_mut();
                action.sa_sigaction = (handle as Handler as *const ()).expose_provenance();
                action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
                Errno::result(libc::sigaction(*signal, action, std::ptr::null_mut()))?;
            }
        }
        Ok(())
    }

    type Handler = extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void);

    extern "C" fn handle(signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
        // SAFETY: with SA_SIGINFO the kernel passes the context of the interrupted thread, which is
        // exclusively this handler's until it returns.
        let counter = unsafe { program_counter(&mut *context.cast::<libc::ucontext_t>()) };
        let at_load = (load as extern "C" fn(u64) -> i32 as *const ()).addr() as u64;
        if *counter == at_load {
            // `failed` returns to the caller of `load` as `load` would: the only instruction of
            // `load` that has run had no effect.
            *counter = (failed as extern "C" fn() -> i32 as *const ()).addr() as u64;
            return;
        }
        let at = CAUGHT.iter().position(|caught| *caught == signal);
        let before = at.and_then(|at| BEFORE[at].get());
        let action = before.map_or(libc::SIG_DFL, |before| before.sa_sigaction);
        let takes_info = before.is_some_and(|before| before.sa_flags & libc::SA_SIGINFO != 0);
        // SAFETY: the address is that of a handler of the type that its flags declare: the code
        // that set the handler guarantees that. It receives the arguments that the kernel passed.
        // `signal` and `raise` take numbers and are allowed in a handler. The kernel sets
        // `si_code`.
        unsafe {
            let was_sent = (*info).si_code <= 0;
            match action {
                libc::SIG_IGN if was_sent => {}
                // A fault occurs again after the return and meets the default action. A signal that
                // was sent does not, so it is raised again.
                libc::SIG_DFL | libc::SIG_IGN => {
                    libc::signal(signal, libc::SIG_DFL);
                    if was_sent {
                        libc::raise(signal);
                    }
                }
                handler => {
                    let handler = std::ptr::with_exposed_provenance::<()>(handler);
                    if takes_info {
                        let handler = std::mem::transmute::<*const (), Handler>(handler);
                        handler(signal, info, context);
                    } else {
                        let handler =
                            std::mem::transmute::<*const (), extern "C" fn(c_int)>(handler);
                        handler(signal);
                    }
                }
            }
        }
    }

    #[cfg(target_arch = "x86_64")]
    fn program_counter(context: &mut libc::ucontext_t) -> &mut u64 {
        let register = &raw mut context.uc_mcontext.gregs[libc::REG_RIP.cast_unsigned() as usize];
        // SAFETY: the register is a 64-bit integer that `context` borrows exclusively.
        unsafe { &mut *register.cast::<u64>() }
    }

    #[cfg(target_arch = "aarch64")]
    fn program_counter(context: &mut libc::ucontext_t) -> &mut u64 {
        &mut context.uc_mcontext.pc
    }
}

/// Fallback without a handler: a read by the kernel for this thread also waits for a missing page.
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
mod catch {
    use super::super::read_checked;
    use super::ReadFault;

    pub(super) fn install() -> std::io::Result<()> {
        Ok(())
    }

    pub(super) fn byte(address: u64) -> Result<u8, ReadFault> {
        let mut byte = [0];
        read_checked(address, &mut byte)?;
        Ok(byte[0])
    }
}
