//! Numbers of exchanges in messages.

use crate::world::exchange::ExchangeId;

/// Number of an exchange: 16 bits for the averager, the first of them for those that were built
/// again, and 16 for the exchange. Ranks are never far apart: each waits for the others.
pub(crate) fn key_of(ExchangeId { averager, number }: ExchangeId) -> u32 {
    ((averager & 0x7fff) | (averager >> 31) << 15) << 16 | (number & 0xffff)
}

/// True if a message of an exchange has no receiver any more, since its sender has shown `newer`:
/// it shows one only when all ranks have completed the last but one before it.
pub(crate) fn is_over(number: u32, newer: u32) -> bool {
    let ahead = (newer as u16).wrapping_sub(number as u16) as i16;
    number >> 16 == newer >> 16 && ahead >= 4 && ahead % 2 == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn averagers_built_again_have_numbers_of_their_own() {
        let key = |averager, number| key_of(ExchangeId { averager, number });
        assert_ne!(key(0, 0), key(1 << 31, 0));
        assert_ne!(key(3, 0), key(3 | 1 << 31, 0));
        assert_ne!(key(0, 2), key(1, 2));
    }

    #[test]
    fn messages_are_over_when_their_sender_is_two_exchanges_ahead() {
        let key = |number| key_of(ExchangeId { averager: 1, number });
        for (number, newer, expected) in [
            (0, 0, false),
            (0, 2, false), // its sender has completed this one, and this rank perhaps not
            (0, 4, true),
            (4, 0, false),
            (0, 5, false),     // exchanges of descriptions have odd numbers
            (65_534, 2, true), // numbers wrap around
        ] {
            assert_eq!(is_over(key(number), key(newer)), expected, "{number} {newer}");
        }
        assert!(!is_over(key(0), key_of(ExchangeId { averager: 2, number: 8 })));
    }
}
