//! Giving up rights: a filter of system calls, and capabilities.

use std::io;

use nix::errno::Errno;

/// Installs a seccomp filter in the calling thread, and in those that it starts from now on. What it
/// refuses is logged by the kernel, where its administrator hasn't turned that off
/// (`kernel.seccomp.actions_logged`).
///
/// The thread must have given up new privileges before, or have `CAP_SYS_ADMIN`.
pub fn install_filter(program: &[libc::sock_filter]) -> io::Result<()> {
    let program = libc::sock_fprog {
        len: program.len().try_into().map_err(|_| Errno::EINVAL)?,
        // The kernel only reads it.
        filter: program.as_ptr().cast_mut(),
    };
    // SAFETY: the program is live, as long as it says, and copied by the kernel, which checks that it is
    // one. What it forbids fails or ends the process; it can't give a call another meaning but by an error.
    let result = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            libc::SECCOMP_FILTER_FLAG_LOG,
            &raw const program,
        )
    };
    Errno::result(result)?;
    Ok(())
}

/// The capability to signal the processes of other users.
pub const CAP_KILL: u32 = 5;

/// Gives up all capabilities of the calling thread but `kept`, of those that it has.
pub fn keep_capabilities(kept: &[u32]) -> io::Result<()> {
    /// `_LINUX_CAPABILITY_VERSION_3`: two sets of 32.
    #[repr(C)]
    struct Header {
        version: u32,
        pid: i32,
    }
    #[repr(C)]
    #[derive(Clone, Copy, Default)]
    struct Sets {
        effective: u32,
        permitted: u32,
        inheritable: u32,
    }
    let header = Header {
        version: 0x2008_0522,
        pid: 0,
    };
    let mut sets = [Sets::default(); 2];
    // SAFETY: the kernel reads the header and writes two structures, which are there.
    let result = unsafe { libc::syscall(libc::SYS_capget, &raw const header, sets.as_mut_ptr()) };
    Errno::result(result)?;
    for (index, sets) in (0_u32..).zip(&mut sets) {
        let bits = kept
            .iter()
            .filter(|number| **number / 32 == index)
            .fold(0, |bits, number| bits | 1 << (number % 32));
        sets.permitted &= bits;
        sets.effective = sets.permitted;
        sets.inheritable = 0;
    }
    // SAFETY: the kernel reads a header and two structures, which are there.
    let result = unsafe { libc::syscall(libc::SYS_capset, &raw const header, sets.as_ptr()) };
    Errno::result(result)?;
    Ok(())
}
