# SPDX-License-Identifier: Apache-2.0
"""How tokens are chosen, and the translation to what the reference engine knows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dynamo_mpi.engines.protocol import GenerationRequest, Sampling


class LogitsProcessor:
    """To be derived from; a request that has one is refused."""


@dataclass
class GuidedDecodingParams:
    """As the real one has it; a request that has it is refused."""

    json: Any = None
    regex: str | None = None
    grammar: str | None = None
    json_object: bool = False
    structural_tag: str | None = None


@dataclass
class SamplingParams:
    """The fields that dynamo.trtllm sets or reads; some of them can only hold what they hold by default."""

    max_tokens: int | None = 32
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    detokenize: bool = True
    return_perf_metrics: bool = False
    n: int = 1
    best_of: int | None = None
    use_beam_search: bool = False
    length_penalty: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    guided_decoding: GuidedDecodingParams | None = None
    logits_processor: Any = None

    def to_request(self, request_id: int, prompt: list[int], end_ids: frozenset[int]) -> GenerationRequest:
        """Translate.

        Raises:
            NotImplementedError: the stand-in lacks what is asked for.
        """
        self._refuse_what_is_missing()
        values = (self.temperature, self.top_p, self.top_k)
        greedy = all(value is None for value in values) or self.temperature == 0 or self.top_k == 1 or self.top_p == 0
        return GenerationRequest(
            str(request_id),
            tuple(prompt),
            max_tokens=self.max_tokens,
            min_tokens=self.min_tokens or 0,
            stop_token_ids=frozenset() if self.ignore_eos else end_ids | frozenset(self.stop_token_ids or ()),
            sampling=Sampling(
                temperature=0.0 if greedy else 1.0 if self.temperature is None else self.temperature,
                top_p=1.0 if self.top_p is None else self.top_p,
                top_k=self.top_k or 0,
                seed=self.seed,
            ),
        )

    def _refuse_what_is_missing(self) -> None:
        neutral: dict[str, tuple[Any, ...]] = {
            "n": (1,),
            "best_of": (None, 1),
            "use_beam_search": (False,),
            "min_p": (None, 0),
            "repetition_penalty": (None, 1),
            "presence_penalty": (None, 0),
            "frequency_penalty": (None, 0),
            "logprobs": (None, 1),
            "prompt_logprobs": (None,),
            "guided_decoding": (None,),
            "logits_processor": (None,),
        }
        for name, values in neutral.items():
            if getattr(self, name) not in values:
                raise NotImplementedError(f"the stand-in has no {name}: {getattr(self, name)!r} was asked for")
