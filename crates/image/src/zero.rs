//! Finding zeroes in data.

/// Whether all bytes are zeroes.
pub fn is_zero(bytes: &[u8]) -> bool {
    // Whole blocks without a branch become vector instructions.
    let (blocks, rest) = bytes.as_chunks::<256>();
    let or = |bytes: &[u8]| bytes.iter().fold(0, |all, byte| all | byte);
    blocks.iter().all(|block| or(block) == 0) && or(rest) == 0
}

/// Length of the longest run of granules from the first on that are all zeroes or all not, and
/// whether it is zeroes. The last granule may be shorter.
pub fn first_run(bytes: &[u8], granule: usize) -> (usize, bool) {
    let mut granules = bytes
        .chunks(granule.max(1))
        .map(|it| (it.len(), is_zero(it)));
    let Some((first, zero)) = granules.next() else {
        return (0, true);
    };
    let more = granules.take_while(|granule| granule.1 == zero);
    (first + more.map(|granule| granule.0).sum::<usize>(), zero)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_bit_anywhere_is_not_zero() {
        for len in [0, 1, 255, 256, 257, 1000] {
            let mut bytes = vec![0; len];
            assert!(is_zero(&bytes));
            for at in 0..len {
                bytes[at] = 0x10;
                assert!(!is_zero(&bytes), "{at} of {len}");
                bytes[at] = 0;
            }
        }
    }

    #[test]
    fn runs_are_as_long_as_can_be() {
        let mut bytes = [0; 35];
        assert_eq!(first_run(&bytes, 10), (35, true));
        bytes[12] = 1;
        assert_eq!(first_run(&bytes, 10), (10, true));
        assert_eq!(first_run(&bytes[10..], 10), (10, false));
        assert_eq!(first_run(&bytes[20..], 10), (15, true));
        bytes[29] = 1;
        bytes[34] = 1;
        assert_eq!(first_run(&bytes[10..], 10), (25, false));
        assert_eq!(first_run(&[], 10), (0, true));
    }
}
