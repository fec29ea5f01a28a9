#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Software:  ai-dynamo 1.4.2, ai-dynamo-runtime 1.4.2 (PyPI), Linux; file discovery, tcp request plane.
# Seen:      a second worker registers a model's name with another chat template (and another context length) than the first. The frontend
#            logs an error, "Checksum for new worker does not match", and sends it half of the requests all the same, with prompts that the
#            first one's template made. Neither worker is told.
# Expected:  no requests for a worker whose card isn't taken, or prompts by its own card; 1.6.1 sends it none.
# Output on 2026-11-30:
#   frontend: Checksum for new worker does not match existing WorkerSet's checksum
#   one, whose template makes 1 token: got prompts of 1 token
#   two, whose template makes 3 tokens: got prompts of 1 token
# Ends with 0 where that is still so, with 1 where it has changed, with 2 where it could not be tried.

set -euo pipefail

folder=$(mktemp -d)
children=()
finish() {
    exec 2>/dev/null # where bash tells of its kills
    kill -KILL "${children[@]}" || true
    wait
    rm -rf "$folder"
}
trap finish EXIT
{
    "${PYTHON:-python3}" -m venv "$folder/venv"
    "$folder/venv/bin/pip" install -qq --no-cache-dir --disable-pip-version-check ai-dynamo==1.4.2 ai-dynamo-runtime==1.4.2
} || exit 2

cat >"$folder/worker.py" <<'EOF'
# FOLDER CONTEXT NAME: serves "m" and says how many tokens each prompt has
import asyncio
import sys

from dynamo.llm import ModelInput, ModelRuntimeConfig, ModelType, WorkerType, register_model
from dynamo.runtime import DistributedRuntime

folder, context_length, name = sys.argv[1:]


async def answer(request, context=None):
    print(f"{name} got {len(request['token_ids'])}", flush=True)
    yield {"token_ids": [2], "finish_reason": "stop"}


async def main():
    endpoint = DistributedRuntime(asyncio.get_running_loop(), "file", "tcp").endpoint("findings.backend.generate")
    serving = asyncio.ensure_future(endpoint.serve_endpoint(answer))
    config = ModelRuntimeConfig()
    config.context_length = int(context_length)
    kind = dict(worker_type=WorkerType.Aggregated, needs=[])
    await register_model(ModelInput.Tokens, ModelType.Chat, endpoint, folder, "m", runtime_config=config, **kind)
    print("registered", flush=True)
    await serving


asyncio.run(main())
EOF
cat >"$folder/client.py" <<'EOF'
# PORT [COUNT]: whether the model is listed; or asks so often
import json
import sys
import urllib.request

url = f"http://127.0.0.1:{sys.argv[1]}/v1/"
if len(sys.argv) == 2:
    with urllib.request.urlopen(url + "models", timeout=5) as reply:
        sys.exit(0 if json.load(reply)["data"] else 1)
body = json.dumps({"model": "m", "messages": [{"role": "user", "content": "b"}]}).encode()
for _ in range(int(sys.argv[2])):
    request = urllib.request.Request(url + "chat/completions", body, {"content-type": "application/json"})
    urllib.request.urlopen(request, timeout=20).read()
EOF
cat >"$folder/models.py" <<'EOF'
# two model folders of three words, with unlike templates
import json
import pathlib

vocab = {"<unk>": 0, "a": 1, "b": 2}
model = {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"}
tokenizer = {"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "Whitespace"}, "model": model}
tokenizer |= dict.fromkeys(("truncation", "padding", "normalizer", "post_processor", "decoder"))
config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8, "num_attention_heads": 1}
config |= {"num_hidden_layers": 1, "vocab_size": 3, "max_position_embeddings": 64, "eos_token_id": 0, "bos_token_id": 0}
for name, template in (("one", "a"), ("two", "a b b")):
    folder = pathlib.Path(__file__).with_name(name)
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "config.json").write_text(json.dumps(config))
    words = {"chat_template": template, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(words))
EOF
cd "$folder"
venv/bin/python models.py
mkdir kv
port=$(venv/bin/python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
clean=(env -i HOME="$folder" TMPDIR="$folder" DYN_LOG=error DYN_FILE_KV="$folder/kv")

# SECONDS COMMAND…: until it succeeds
until_true() {
    local end=$((SECONDS + $1))
    shift
    until "$@" >/dev/null 2>&1; do
        ((SECONDS < end)) || exit 2
        sleep 0.2
    done
}
serve() {
    "${clean[@]}" venv/bin/python worker.py "$folder/$1" "$2" "$1" >"$1.log" 2>&1 &
    children+=($!)
    until_true 60 grep -q '^registered' "$1.log"
}
serve one 32
"${clean[@]}" venv/bin/python -m dynamo.frontend --http-port "$port" --discovery-backend file --request-plane tcp >frontend.log 2>&1 &
children+=($!)
until_true 90 venv/bin/python client.py "$port"
serve two 16
# it looks at the card as soon as it is there
for _ in {1..50}; do
    if grep -q Checksum frontend.log; then break; fi
    sleep 0.2
done
venv/bin/python client.py "$port" 12 || exit 2
logged=$(grep -o 'Checksum for new worker does not match existing WorkerSet.s checksum' frontend.log | head -n 1 || true)
got() { grep "^$1 got" "$1.log" | sort -u | sed 's/.* //' | tr '\n' ' ' || true; }
echo "frontend: ${logged:-no error about checksums}"
echo "one, whose template makes 1 token: got prompts of $(got one)token"
echo "two, whose template makes 3 tokens: got prompts of $(got two)token"
[[ -n $logged && $(got one) == "1 " && $(got two) == "1 " ]] || exit 1
