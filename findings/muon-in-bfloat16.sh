#!/usr/bin/env bash
# One would guess: torch.optim.Muon, given float32 weights and a float32 gradient, computes in float32; so
# if the gradient is one outer product u vᵀ, the step is a multiple of it.
# What happens: it orthogonalizes in bfloat16, and no argument changes that. Of a gradient of rank 1 its
# step has 85% of its norm (70% of its square) outside the direction u vᵀ: rounding, lifted like a small
# singular value.
# Version: torch 2.13.0 (the class came with 2.9).
# Who is hurt: whoever has few rows in a batch (their gradients have low rank), reads Muon's steps as
# directions, or trains on a processor without bfloat16 instructions, where such products take many times as
# long.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install -q torch==2.13.0 numpy==2.4.4
"$folder/bin/python" - <<'PYTHON'
import torch

torch.manual_seed(0)
u, v = torch.randn(128), torch.randn(512)
p = torch.nn.Parameter(torch.zeros(128, 512))
p.grad = torch.outer(u, v)
torch.optim.Muon([p], lr=1.0, weight_decay=0.0).step()
step = p.detach()
direction = torch.outer(u, v) / (u.norm() * v.norm())
along = (step * direction).sum()
outside = (step - along * direction).norm()
share = (outside / step.norm()).item()
print(f"torch {torch.__version__}: weights {p.dtype}, gradient {p.grad.dtype} of rank 1")
print(f"step along the gradient {along.abs():.2f}, outside it {outside:.2f}: {share:.0%} of the step's norm")

x = p.grad / p.grad.norm()  # the same five iterations in float32
for _ in range(5):
    gram = x @ x.T
    x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
outside = (x - (x * direction).sum() * direction).norm() / x.norm()
print(f"the same iterations in float32: {outside:.4%} outside")
assert 0.7 < share < 0.95 and outside < 0.001, "the behaviour has changed"
PYTHON
