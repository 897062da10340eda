//! Access to a device's config space.

/// Copies what `space` holds from `offset` on into `data`; bytes beyond its end stay as they are.
pub(super) fn read(space: &[u8], offset: u64, data: &mut [u8]) {
    let rest = usize::try_from(offset)
        .ok()
        .and_then(|offset| space.get(offset..))
        .unwrap_or_default();
    for (slot, byte) in data.iter_mut().zip(rest) {
        *slot = *byte;
    }
}
