"""Tests truncation of prompt and completion."""

import pytest

from cpt_kernels.data.truncation import truncate


@pytest.mark.parametrize(
    ("prompt", "completion", "max_length", "mode", "expected"),
    [
        ([1, 2], [3, 4], None, "keep_start", ([1, 2], [3, 4])),
        ([1, 2], [3, 4], 4, "keep_end", ([1, 2], [3, 4])),
        ([1, 2], [3, 4], 3, "keep_start", ([1, 2], [3])),
        ([1, 2], [3, 4], 1, "keep_start", ([1], [])),
        ([1, 2], [3, 4], 3, "keep_end", ([2], [3, 4])),
        ([1, 2], [3, 4], 2, "keep_end", ([3], [4])),
        ([1, 2], [3, 4, 5], 2, "keep_end", ([4], [5])),
        ([1, 2], [3, 4], 1, "keep_end", ([4], [])),
        ([], [3, 4], None, "keep_start", ([3], [4])),
        ([], [], 5, "keep_end", ([], [])),
    ],
)
def test_truncate(prompt, completion, max_length, mode, expected):
    assert truncate(prompt, completion, max_length, mode) == expected


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_truncate_scores_what_trl_scores(mode):
    """TRL slices ids and completion mask of the whole sequence, and its shift of targets drops the first position."""
    window = slice(None, 4) if mode == "keep_start" else slice(-4, None)
    for p in range(6):
        for c in range(6):
            ids, mask = list(range(p + c))[window], ([0] * p + [1] * c)[window]
            prompt, completion = truncate(list(range(p)), list(range(p, p + c)), 4, mode)
            assert prompt + completion == ids
            assert completion == [token for token, scored in list(zip(ids, mask))[1:] if scored]
