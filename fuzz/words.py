"""Text for the harnesses of tables: bytes below 128 stand for themselves, the others for words."""

from __future__ import annotations

WORDS = [
    *("linear", "striped", "zero", "error", "delay", "flakey"),
    *("snapshot", "snapshot-origin", "snapshot-merge", "snapshot-merge-of"),
    *("a.img", "c.img", "d.img", "none.img", "lin", "org", "huge", "x", "y"),
    *("7:0", "7:1", "254:0", "254:1", "254:9", "1:3"),
    *("P", "PO", "N", "p", "PX", "discard_zeroes_cow", "discard_passdown_origin"),
    *("drop_writes", "error_writes", "error_reads", "corrupt_bio_byte", "random_read_corrupt"),
    *("0", "1", "2", "4", "7", "8", "16", "32", "33", "63", "64", "65", "128", "-1", "+8", "007"),
    *("4194304", "4294967296", "9223372036854775807", "18446744073709551615", "1" * 25, "9" * 5000),
    *(" ", "  ", "\t", "\n", "\r", "\v", "\0", "#", "\\", "\\ ", "\\\\", "\\,", "\\;", ",", ";"),
    *("0 64 ", "\n0 32 ", "\n32 32 ", " snapshot lin c.img P 8", " linear a.img 0", " zero"),
    *("ro", "rw", ",,,", ",,,,", ",ro,", ",uuid,", ",,7,", "0123456789abcdef"),
    *("é", "\u2028", "\x85", "\xa0", "٣", "²", "\udc80", "\ud800", "😀", "ſ", "İ"),
]


LONGEST = 8000


def text_of(data: bytes) -> str:
    """Return the text the bytes stand for, cut to a length that is quick under the sanitizer.

    It has no "/", so it names no file outside a folder.
    """
    words = [chr(byte) if byte < 128 else WORDS[(byte - 128) % len(WORDS)] for byte in data]
    return "".join(words).replace("/", "|")[:LONGEST]
