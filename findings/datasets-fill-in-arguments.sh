#!/usr/bin/env bash
# One would guess: rows that are put into a dataset come back as they were.
# What happens: a list of objects is one struct for the whole column. An object gets every key that any
# other object of the column has, with None: the call weather(city="Rome") comes back as
# weather(city="Rome", day=None), in every row, and a message without tool calls has "tool_calls": None.
# Version: datasets 5.2.0.
# Who is hurt: whoever trains on tool calls. A chat template that prints arguments teaches the model to pass
# None for arguments of other tools, and "key in message" is no test any more.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install -q datasets==5.2.0 numpy==2.4.4
"$folder/bin/python" - <<'PYTHON' 2>/dev/null
import datasets

call = lambda **arguments: {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"name": "weather", "arguments": arguments}],
}
rows = [{"messages": [{"role": "user", "content": "Rome?"}, call(city="Rome")]}, {"messages": [call(day=3)]}]
back = [*datasets.Dataset.from_list(rows)]
print(f"put in:   {rows[0]['messages']}\ncame back: {back[0]['messages']}")
print(f"datasets {datasets.__version__}")
user, weather = back[0]["messages"]
changed = (
    weather["tool_calls"][0]["arguments"] == {"city": "Rome", "day": None} and user["tool_calls"] is None
)
assert changed, "the behaviour has changed"
PYTHON
