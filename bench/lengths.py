"""How many utterances the conversations of MELD and IEMOCAP have: numbers only, no line of either corpus.

MELD: true, counted by Dialogue_ID in the three csv files of the release.
IEMOCAP: a RECONSTRUCTION. The release needs a licence, and all that is used here are statistics: sessions 1-4 have 120
conversations with 5,810 utterances, session 5 (test) has 31 with 1,623; the shortest of all has 8, the longest 110;
the median of sessions 1-4 is 47. The lists below meet them all and are otherwise made up by `reconstruct`. Whatever is
shown of them has to say so.
"""

# Conversations of 1, 2, 3, .. utterances.
MELD_HISTOGRAM = {
    "train": [70, 60, 54, 48, 67, 61, 74, 67, 50, 57, 55, 54, 36, 41, 43, 51, 30, 28, 27, 20, 20, 13, 7, 5],
    "dev": [6, 4, 7, 4, 9, 8, 4, 7, 5, 8, 13, 8, 6, 5, 3, 2, 4, 0, 4, 3, 1, 2, 1],
    "test": [12, 17, 17, 17, 25, 21, 11, 16, 22, 17, 11, 17, 12, 11, 9, 7, 13, 4, 7, 4, 2, 3, 4, *[0] * 9, 1],
}


def reconstruct(conversations: int, utterances: int, mid: int, low: int = 8, high: int = 110) -> list[int]:
    """An ascending list of `conversations` lengths from low to high with median mid and sum `utterances`.

    The length at the fraction q of the list is low + (mid - low) sqrt(2q) below the middle and
    mid + (high - mid) (2q - 1)^3 above, rounded: dense around mid, thin at the ends. What the sum then lacks is spread
    over the third quarter.
    """
    lengths = []
    for i in range(conversations):
        q = i / (conversations - 1)
        length = low + (mid - low) * (2 * q) ** 0.5 if q < 0.5 else mid + (high - mid) * (2 * q - 1) ** 3
        lengths.append(round(length))
    lacking, third_quarter = utterances - sum(lengths), range(conversations // 2 + 1, 3 * conversations // 4)
    for step in range(abs(lacking)):
        lengths[third_quarter[-1 - step % len(third_quarter)]] += 1 if lacking > 0 else -1
    return sorted(lengths)


# The median of the test session is not published; 52 lies near its mean, 52.4.
IEMOCAP_RECONSTRUCTED = {"train": reconstruct(120, 5810, mid=47), "test": reconstruct(31, 1623, mid=52)}
MELD = {
    split: [n for n, many in enumerate(sizes, start=1) for _ in range(many)] for split, sizes in MELD_HISTOGRAM.items()
}
