//! Dropping of privileges: a system call filter, and capabilities.

use std::io;

use nix::errno::Errno;

/// Installs a seccomp filter in the calling thread, and in those that it starts from now on. The
/// kernel logs what the filter refuses, unless the administrator has turned that off
/// (`kernel.seccomp.actions_logged`).
///
/// The thread must have set `no_new_privs` before, or have `CAP_SYS_ADMIN`.
pub fn install_filter(program: &[libc::sock_filter]) -> io::Result<()> {
    let program = libc::sock_fprog {
        len: program.len().try_into().map_err(|_| Errno::EINVAL)?,
        // The kernel only reads the program.
        filter: program.as_ptr().cast_mut(),
    };
    // SAFETY: the program is live, has the declared length, and is copied by the kernel, which
    // validates it. A forbidden call fails or kills the process; the filter can change the meaning
    // of a call only by an error.
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

/// Drops all capabilities of the calling thread except those in `kept` that it has.
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
    // SAFETY: the kernel reads the header and writes two structures, for which there is room.
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
    // SAFETY: the kernel reads a header and two structures, which exist.
    let result = unsafe { libc::syscall(libc::SYS_capset, &raw const header, sets.as_ptr()) };
    Errno::result(result)?;
    Ok(())
}
