//! Physical memory, which is mapped where it is, and what the compiler calls to move bytes.

use core::arch::asm;

/// Reads device or table memory.
pub fn read<T: Copy>(address: u64) -> T {
    // SAFETY: All 4 GiB are mapped; whoever reads knows of an address of a device or a table that
    // has a value of any bit pattern there.
    unsafe { core::ptr::read_volatile(address as *const T) }
}

/// Writes device memory.
pub fn write<T: Copy>(address: u64, value: T) {
    // SAFETY: All 4 GiB are mapped; only registers of devices are written this way.
    unsafe { core::ptr::write_volatile(address as *mut T, value) }
}

/// Guest memory as bytes.
///
/// # Safety
/// It must be RAM that nothing else uses: neither the firmware itself nor another such slice.
pub unsafe fn slice(address: u64, len: usize) -> &'static mut [u8] {
    // SAFETY: The caller's promise; all 4 GiB are mapped.
    unsafe { core::slice::from_raw_parts_mut(address as *mut u8, len) }
}

/// Copies forward.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, len: usize) -> *mut u8 {
    // SAFETY: The caller's promise of two valid ranges. Words first: as fast as bytes where the
    // processor has fast strings, and faster where it has not.
    unsafe {
        asm!(
            "rep movsq",
            "mov ecx, {rest:e}",
            "rep movsb",
            rest = in(reg) len & 7,
            inout("rcx") len >> 3 => _,
            inout("rdi") to => _,
            inout("rsi") from => _,
            options(nostack, preserves_flags),
        );
    }
    to
}

/// Copies, also between ranges that overlap.
#[unsafe(no_mangle)]
unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, len: usize) -> *mut u8 {
    if (to as usize).wrapping_sub(from as usize) >= len {
        // SAFETY: The caller's promise; forward is right when the target is not inside the source.
        return unsafe { memcpy(to, from, len) };
    }
    // SAFETY: The caller's promise; backward, for the target begins inside the source.
    unsafe {
        asm!(
            "std",
            "rep movsb",
            "cld",
            inout("rcx") len => _,
            inout("rdi") to.wrapping_add(len).wrapping_sub(1) => _,
            inout("rsi") from.wrapping_add(len).wrapping_sub(1) => _,
            options(nostack),
        );
    }
    to
}

/// Fills.
#[unsafe(no_mangle)]
unsafe extern "C" fn memset(to: *mut u8, byte: i32, len: usize) -> *mut u8 {
    // SAFETY: The caller's promise of a valid range.
    unsafe {
        asm!(
            "rep stosb",
            inout("rcx") len => _,
            inout("rdi") to => _,
            in("al") byte.to_le_bytes()[0],
            options(nostack, preserves_flags),
        );
    }
    to
}

/// Compares.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcmp(a: *const u8, b: *const u8, len: usize) -> i32 {
    let mut at = 0;
    while at < len {
        // SAFETY: The caller's promise of two valid ranges. Volatile, or the compiler would make
        // this a call to itself.
        let (x, y) = unsafe { (a.add(at).read_volatile(), b.add(at).read_volatile()) };
        if x != y {
            return i32::from(x) - i32::from(y);
        }
        at += 1;
    }
    0
}

/// Compares for equality.
#[unsafe(no_mangle)]
unsafe extern "C" fn bcmp(a: *const u8, b: *const u8, len: usize) -> i32 {
    // SAFETY: The caller's promise.
    unsafe { memcmp(a, b, len) }
}
