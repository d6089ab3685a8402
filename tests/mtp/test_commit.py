from __future__ import annotations

import pytest
import torch
from conftest import DEVICE
from hypothesis import given
from hypothesis import strategies as st

from n3kernels.mtp import commit

OPS = ("mtp_commit",)


def ints(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


@given(st.data())
def test_agrees_with_a_loop_over_requests(backend, data):
    b, k, extra = (data.draw(st.integers(*bounds)) for bounds in ((0, 5), (0, 4), (0, 3)))
    slots, length = b + extra, 2 * (k + 1) + data.draw(st.integers(0, 4))
    slot = data.draw(st.permutations(range(slots)))[:b]
    slot = [s if data.draw(st.integers(0, 3)) else data.draw(st.sampled_from([-1, slots])) for s in slot]
    emitted = [data.draw(st.integers(0, k + 1)) for _ in range(b)]
    tokens = [[data.draw(st.integers(0, 9)) if j < n else -1 for j in range(k + 1)] for n in emitted]
    seq = [data.draw(st.integers(0, 50)) for _ in range(slots)]
    most = [n + data.draw(st.integers(0, 6)) for n in seq]
    rings = [[data.draw(st.integers(0, length - 1)), data.draw(st.integers(0, length - k - 1))] for _ in range(slots)]
    cu = [(k + 1) * i for i in range(b + 1)]

    def tensor(values, *shape):
        return torch.tensor(values, dtype=torch.int32, device=DEVICE).view(*shape)

    seq_len, finished, ring = tensor(seq, slots), tensor([0] * slots, slots), tensor(rings, slots, 2)
    histogram = torch.zeros(k + 1, dtype=torch.int64, device=DEVICE)
    out = commit(
        tensor(tokens, b, k + 1), tensor(emitted, b), tensor(cu, b + 1), seq_len, slot=tensor(slot, b), eos_ids=ints(7),
        max_len=tensor(most, slots), finished=finished, histogram=histogram, ring_pos=ring, ring_size=length,
        ring_tokens=k + 1,
    )  # fmt: skip

    want = [[0] * b, [-1] * b, [-1] * b, [0] * b, [0] * b]
    flat, bounds, counts, done = [], [0], [0] * (k + 1), [0] * slots
    for i, (s, a) in enumerate(zip(slot, emitted, strict=True)):
        if 0 <= s < slots and a:
            values = a, tokens[i][a - 1], cu[i] + a - 1, seq[s], k + 1 - a
            for column, value in zip(want, values, strict=True):
                column[i] = value
            flat += tokens[i][:a]
            counts[min(a, k)] += 1
            seq[s] = min(seq[s] + a, most[s])
            done[s] = (7 in tokens[i][:a]) + 2 * (seq[s] >= most[s])
            start, count = rings[s]
            folds = count + 2 * (k + 1) > length
            rings[s] = [(start + count) % length, a] if folds else [start, count + a]
        bounds.append(len(flat))
    flat += [-1] * (b * (k + 1) - len(flat))
    assert [t.tolist() for t in out] == [*want, flat, bounds]
    assert (seq_len.tolist(), finished.tolist(), histogram.tolist()) == (seq, done, counts)
    assert ring.tolist() == rings


def test_without_options(backend):
    seq_len = ints(5, 6)
    out = commit(ints([3, 4], [5, -1]), ints(2, 1), ints(0, 2, 4), seq_len)
    assert [t.tolist() for t in out] == [[2, 1], [4, 5], [1, 2], [5, 6], [0, 1], [3, 4, 5, -1], [0, 2, 3]]
    assert seq_len.tolist() == [7, 7]


GOOD = {"tokens": ([3, 4], [5, -1]), "num_emitted": (2, 1), "cu_rows": (0, 2, 4), "seq_len": (5, 6)}
BAD = {
    "tokens must be int32, got int64": {"tokens": torch.zeros(2, 2, dtype=torch.int64)},
    "tokens must have at least 1 column, got 0": {"tokens": torch.zeros(2, 0, dtype=torch.int32)},
    "num_emitted must have shape [2], got [3]": {"num_emitted": torch.zeros(3, dtype=torch.int32)},
    "cu_rows must have shape [3], got [2]": {"cu_rows": torch.zeros(2, dtype=torch.int32)},
    "seq_len must have at least 2 elements when slot is None, got 1": {"seq_len": torch.zeros(1, dtype=torch.int32)},
    "histogram must be int64, got int32": {"histogram": torch.zeros(2, dtype=torch.int32)},
    "ring_pos must have shape [2, 2], got [2]": {"ring_pos": torch.zeros(2, dtype=torch.int32)},
    "ring_tokens must be at least 1 with ring_pos, got 0": {"ring_pos": torch.zeros(2, 2, dtype=torch.int32)},
    "ring_size must be at least 4, got 3": {
        "ring_pos": torch.zeros(2, 2, dtype=torch.int32), "ring_size": 3, "ring_tokens": 2,
    },
}  # fmt: skip


@pytest.mark.parametrize("message", BAD)
def test_bad_calls(backend, message):
    args = {name: ints(*values) for name, values in GOOD.items()}
    args |= {n: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for n, v in BAD[message].items()}
    with pytest.raises(RuntimeError) as error:
        commit(**args)
    assert str(error.value).splitlines()[0] == f"n3::mtp_commit: {message}"


def test_opcheck(backend):
    args = tuple(ints(*values) for values in GOOD.values())
    torch.library.opcheck(torch.ops.n3.mtp_commit.default, args, {"ring_pos": ints([0, 1], [0, 2]), "ring_size": 4,
                                                                  "ring_tokens": 2})  # fmt: skip
