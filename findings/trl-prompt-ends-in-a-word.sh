#!/usr/bin/env bash
# One would guess: of a pair without a "prompt" TRL takes as the prompt what both texts share up to where
# the answers begin: the last turn of a transcript, or at least a whole word.
# What happens: it takes the longest common beginning, letter by letter. "… Assistant: Yes, I am." and "…
# Assistant: Yesterday." have the prompt "… Assistant: Yes", and the answers ", I am." and "terday."
# Version: TRL 1.16.0.
# Who is hurt: whoever trains on transcripts in which answers begin alike. A sum of log-ratios over both
# answers does not mind what they share, but means per token, lengths and the tokens at the cut do; and so
# does whoever samples.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install -q torch==2.13.0 numpy==2.4.4 transformers==5.24.0 accelerate==1.15.0 \
    datasets==5.2.0 trl==1.16.0
HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error "$folder/bin/python" - <<'PYTHON' 2>/dev/null
import trl
from trl import extract_prompt

asked = "\n\nHuman: Are you there?\n\nAssistant:"
found = extract_prompt({"chosen": f"{asked} Yes, I am.", "rejected": f"{asked} Yesterday."})
print(f"prompt {found['prompt']!r}\nchosen {found['chosen']!r}\nrejected {found['rejected']!r}")
print(f"trl {trl.__version__}")
wanted = {"prompt": f"{asked} Yes", "chosen": ", I am.", "rejected": "terday."}
assert {key: found[key] for key in wanted} == wanted, "the behaviour has changed"
PYTHON
