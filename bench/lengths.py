"""How many utterances the conversations of IEMOCAP and MELD have: numbers only, no line of either corpus.

IEMOCAP: the utterances with one of the six emotions. Sessions 1-4 are split 9:1 into train and dev; session 5 is test.
MELD: counted by Dialogue_ID in the three csv files of the release.
"""

# fmt: off
IEMOCAP = {
    "train": [
        26, 30, 44, 61, 59, 44, 28, 74, 26, 54, 47, 72, 26, 66, 35, 49, 46, 57, 60, 50, 69, 27, 54, 52, 79, 51, 45, 46,
        36, 38, 35, 46, 54, 27, 30, 43, 74, 51, 61, 47, 26, 44, 37, 51, 41, 53, 51, 60, 34, 53, 69, 33, 57, 60, 35, 42,
        31, 53, 56, 47, 87, 29, 62, 37, 77, 18, 53, 44, 59, 53, 53, 63, 53, 42, 42, 69, 26, 47, 37, 8, 40, 47, 61, 62,
        43, 26, 47, 62, 34, 39, 66, 26, 60, 45, 56, 38, 39, 83, 40, 50, 52, 58, 32, 20, 44, 54, 34, 94,
    ],
    "dev": [44, 43, 24, 58, 32, 18, 64, 63, 78, 63, 110, 50],
    "test": [
        44, 49, 83, 84, 91, 52, 68, 59, 53, 28, 44, 43, 59, 37, 59, 40, 29, 58, 75, 42, 28, 83, 54, 52, 44, 23, 43, 34,
        58, 43, 64,
    ],
}
# fmt: on

# Conversations of 1, 2, 3, .. utterances.
MELD_HISTOGRAM = {
    "train": [70, 60, 54, 48, 67, 61, 74, 67, 50, 57, 55, 54, 36, 41, 43, 51, 30, 28, 27, 20, 20, 13, 7, 5],
    "dev": [6, 4, 7, 4, 9, 8, 4, 7, 5, 8, 13, 8, 6, 5, 3, 2, 4, 0, 4, 3, 1, 2, 1],
    "test": [12, 17, 17, 17, 25, 21, 11, 16, 22, 17, 11, 17, 12, 11, 9, 7, 13, 4, 7, 4, 2, 3, 4, *[0] * 9, 1],
}
MELD = {
    split: [n for n, many in enumerate(sizes, start=1) for _ in range(many)] for split, sizes in MELD_HISTOGRAM.items()
}
