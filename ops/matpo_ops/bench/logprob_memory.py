"""Peak memory of the log-prob step: hidden states -> log-probs and their gradient. Each side in a process of its own.

The figure is the growth of the process's peak resident memory (Linux: VmHWM) over what it held before the step. That of
the naive form is in proportion to T; it is measured at T / 8 and multiplied, because at T it would need more than most
machines have.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import torch

from matpo.settings import LearnerSettings
from matpo_learner.logprobs import Head

VOCABULARY, TOKENS, WIDTH = 150_000, 8192, 64
NAIVE_PART = 8


def ratio() -> float:
    """Peak memory of the naive form divided by ours, V = 150k, T = 8k, float32."""
    return NAIVE_PART * _in_child("naive") / _in_child("chunked")


def _in_child(side: str) -> int:
    command = [sys.executable, "-m", "matpo_ops.bench.logprob_memory", side]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def _peak_bytes(side: str) -> int:
    torch.manual_seed(0)
    num_tokens = TOKENS // NAIVE_PART if side == "naive" else TOKENS
    weight = torch.nn.Parameter(torch.randn(VOCABULARY, WIDTH) / 8)
    hidden = torch.randn(num_tokens, WIDTH, requires_grad=True)
    targets = torch.randint(0, VOCABULARY, (num_tokens,))
    weight.grad, hidden.grad = torch.zeros_like(weight), torch.zeros_like(hidden)
    before = psutil.Process().memory_info().rss
    if side == "naive":
        logs = (hidden @ weight.T).log_softmax(-1)
        entropy = -(logs.detach().exp() * logs.detach()).sum(-1)
        logprobs = logs.gather(-1, targets[:, None])
    else:
        logprobs, entropy = Head(weight, LearnerSettings().logprob_chunk_tokens)(hidden, targets)
    logprobs.sum().backward()
    assert bool(entropy.isfinite().all())
    # Not getrusage: its ru_maxrss begins at what the parent held when it started us.
    status = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024
    return peak - int(before)


if __name__ == "__main__":
    print(_peak_bytes(sys.argv[1]))
