"""Any ``AutoModelForSequenceClassification`` with one label, read through its own chat template.

Decoder checkpoints (a linear ``score`` head on a base model, the ``GenericForSequenceClassification`` of transformers)
are pooled here, at the last attended token, with the head in float32. transformers itself pools at the last token that
is not ``pad_token_id``: with pad == eos it silently reads one token too early. bfloat16 logits between 16 and 32 are
0.125 apart, so best-of-n would be full of ties. Encoders (BERT, DeBERTa, ...) pool in their own way: their own forward.

Where we differ from the reference code of Speculative Rejection: it sets pad = eos and pads on the left, so its scores
depend on the pooling rule above.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from specrej_eval.config import RunConfig
from specrej_eval.core import Message, RowView
from specrej_eval.errors import CheckpointError, ConfigError, OutOfMemoryError, RewardError

MAX_PADDED_TOKENS = 16_384
"""Tokens of one forward pass, padding included."""

_NO_LIMIT = 1_000_000
"""Tokenizers without a maximum length report about 1e30."""

_logger = logging.getLogger(__name__)


def matches(architectures: Sequence[str]) -> bool:
    """``*ForSequenceClassification`` exactly: names that go on (``...WithNormal_Weights``) are other families."""
    return any(name.endswith("ForSequenceClassification") for name in architectures)


def check(name: str, checkpoint_config: Mapping[str, Any]) -> None:
    """Raises:
    ConfigError: the checkpoint has several labels.
    """
    labels = _num_labels(checkpoint_config)
    if labels != 1:
        raise ConfigError(
            f"reward_model={name!r} has several labels ({labels}) and no rule that makes one reward of them.",
            hint="num_labels must be 1; wrap other models in a function and give pkg.module:function.",
        )


def _num_labels(checkpoint_config: Mapping[str, Any]) -> int:
    """As transformers counts: ``id2label`` wins, ``num_labels`` next, 2 by default."""
    labels = checkpoint_config.get("id2label")
    return len(labels) if labels is not None else int(checkpoint_config.get("num_labels", 2))


def load(name: str, config: RunConfig, *, dtype: str, device: str, token: str | bool | None) -> SequenceClassifier:
    """Load tokenizer and weights from a folder or hub repository.

    Raises:
        CheckpointError: the files cannot be loaded, or hold no weights for the head (transformers would make it up).
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=config.trust_remote_code, token=token)
        model, info = AutoModelForSequenceClassification.from_pretrained(
            name,
            dtype=dtype,
            trust_remote_code=config.trust_remote_code,
            token=token,
            output_loading_info=True,
        )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # files, formats and remote code fail in many ways
        raise CheckpointError(
            f"reward_model={name!r} cannot be loaded: {type(error).__name__}: {error}",
            hint=None if config.trust_remote_code else "remote code runs only with trust_remote_code=True.",
        ) from error
    if missing := sorted(info["missing_keys"]):
        raise CheckpointError(
            f"reward_model={name!r} has no weights for {', '.join(missing[:4])}{' ...' if len(missing) > 4 else ''}; "
            "they would be random.",
            hint="is this the reward model, or the language model it was made from?",
        )
    return SequenceClassifier(model.to(device), tokenizer, name=name, partial_turn=config.partial_turn)


class SequenceClassifier:
    """Scores (conversation, response) pairs; see the module's text for pooling and precision."""

    needs_logprobs = False

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        name: str = "reward model",
        partial_turn: str = "closed",
        max_padded_tokens: int = MAX_PADDED_TOKENS,
    ) -> None:
        """
        Args:
            model: a transformers sequence classifier with one label, on its device.
            tokenizer: its tokenizer, with its chat template if it has one.
            partial_turn: how an unfinished answer is read: ``closed``, as if it were the whole turn (the reference
                code's way), or ``open``, without the template's tail. Finished answers are always closed.
            max_padded_tokens: most tokens of one forward pass, padding included.
        """
        self.name = name
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.tokens_scored = 0
        self.num_calls = 0
        self._open_partials = partial_turn == "open"
        self._max_padded_tokens = max_padded_tokens
        self._decoder = _decoder_parts(model)
        self._max_length = _max_length(model.config, tokenizer)
        self._vocab_size = int(model.get_input_embeddings().weight.shape[0])
        candidates = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
        self._filler = next((i for i in candidates if i is not None and i < self._vocab_size), 0)
        self._merge_system = False
        self._warned: set[str] = set()

    @torch.inference_mode()
    def score(self, conversation: Sequence[Message], rows: Sequence[RowView], response_prefix: str = "") -> list[float]:
        """The head's raw output for each row; no sigmoid.

        Rows that read the same are scored once, so equal answers are exact ties. How rows are split into forward
        passes depends on the rows given, nothing else.

        Raises:
            RewardError: the chat template refuses the conversation, or a token is beyond the model's vocabulary.
            OutOfMemoryError: not even one row at a time fits.
        """
        inputs = self._inputs(conversation, rows, response_prefix)
        # sorted by length, ids second: least padding, and the split does not hang on which row came first
        unique = sorted(set(inputs), key=lambda entry: (len(entry.ids), entry))
        scores: dict[_Input, float] = {}
        for batch in self._batches(unique):
            scores.update(zip(batch, self._forward_or_halves(batch), strict=True))
        return [scores[entry] for entry in inputs]

    # -- text to token ids

    def _inputs(self, conversation: Sequence[Message], rows: Sequence[RowView], response_prefix: str) -> list[_Input]:
        """Each row's input, in row order; too long ones are cut on the left, so that the response stays."""
        known: dict[tuple[str, bool], tuple[_Input, int]] = {}
        inputs = []
        dropped = []
        for row in rows:
            # an unfinished row may end within a character; the bytes so far decode to U+FFFD
            text = row.text if row.finished else row.text.rstrip("\ufffd")
            key = (response_prefix + text, self._open_partials and not row.finished)
            if key not in known:
                known[key] = self._encode(conversation, *key, row=row.row)
            entry, num_dropped = known[key]
            inputs.append(entry)
            if num_dropped:
                dropped.append(num_dropped)
        if dropped:
            self._warn(
                "truncation",
                f"{len(dropped)} of {len(rows)} rows are longer than its {self._max_length} tokens; cut on the left by "
                f"up to {max(dropped)} tokens (said once).",
            )
        return inputs

    def _encode(
        self, conversation: Sequence[Message], response: str, open_turn: bool, *, row: int
    ) -> tuple[_Input, int]:
        """One input and the number of tokens cut from it."""
        if self.tokenizer.chat_template is None:
            encoded = self._encode_plain(conversation, response)
        else:
            encoded = self._encode_chat(conversation, response, open_turn, row=row)
        ids = list(encoded["input_ids"])
        if not ids:  # an empty prompt and response, and a tokenizer without BOS: as the harness does, a prefix token
            ids = [self._filler]
        if max(ids) >= self._vocab_size:
            raise RewardError(
                f"reward_model={self.name!r}: row {row} has token id {max(ids)}, but the model's vocabulary ends at "
                f"{self._vocab_size}: {response[:80]!r}",
                hint="tokenizer and weights do not belong together.",
            )
        types = list(encoded.get("token_type_ids") or ()) if self._decoder is None else []
        cut = self._positions_to_cut(ids, encoded)
        kept = [position for position in range(len(ids)) if position not in cut]
        entry = _Input(tuple(ids[i] for i in kept), tuple(types[i] for i in kept) if types else ())
        return entry, len(cut)

    def _positions_to_cut(self, ids: list[int], encoded: Any) -> set[int]:
        """The leftmost tokens over the limit; BOS stays, and of a pair the prompt goes before the response."""
        excess = len(ids) - self._max_length if self._max_length is not None else 0
        if excess <= 0:
            return set()
        leading = {self.tokenizer.bos_token_id, self.tokenizer.cls_token_id} - {None}
        order = [position for position in range(len(ids)) if position > 0 or ids[0] not in leading]
        if self.tokenizer.chat_template is None and self._decoder is None and encoded.encodings:
            sides = encoded.sequence_ids(0)  # 0 = prompt, 1 = response, None = [CLS], [SEP]
            order = [i for side in (0, 1) for i in order if sides[i] == side]
        return set(order[:excess])

    def _encode_chat(self, conversation: Sequence[Message], response: str, open_turn: bool, *, row: int) -> Any:
        messages = [dict(message) for message in conversation]
        try:
            return self._apply_template(_merged(messages) if self._merge_system else messages, response, open_turn)
        except Exception as error:  # templates refuse with jinja's errors, and fail with any other
            if self._merge_system or not any(message["role"] == "system" for message in messages):
                raise self._template_error(error, row, response, open_turn) from error
            try:
                encoded = self._apply_template(_merged(messages), response, open_turn)
            except Exception:
                raise self._template_error(error, row, response, open_turn) from error
        self._merge_system = True
        self._warn("system", "its chat template takes no system message; it is put before the first user message.")
        return encoded

    def _apply_template(self, messages: list[dict[str, str]], response: str, open_turn: bool) -> Any:
        """Rendered and tokenised in one go: text that went through a template must not meet the tokenizer's own BOS."""
        if open_turn and not response.strip():  # nothing to continue: the turn has only been opened
            return self.tokenizer.apply_chat_template(
                messages, tokenize=True, return_dict=True, add_generation_prompt=True
            )
        return self.tokenizer.apply_chat_template(
            [*messages, {"role": "assistant", "content": response}],
            tokenize=True,
            return_dict=True,
            add_generation_prompt=False,
            continue_final_message=open_turn,
        )

    def _template_error(self, error: Exception, row: int, response: str, open_turn: bool) -> RewardError:
        return RewardError(
            f"the chat template of reward_model={self.name!r} failed: {type(error).__name__}: {error}\n"
            f"  row {row}: {response[:80]!r}",
            hint="it must render a conversation that ends with an assistant message"
            + (" and leave that message's text as it is (else partial_turn=closed)." if open_turn else "."),
        )

    def _encode_plain(self, conversation: Sequence[Message], response: str) -> Any:
        """Without a chat template: prompt + response as one text; for an encoder, the pair (prompt, response)."""
        pair = self._decoder is None
        self._warn(
            "template",
            "its tokenizer has no chat template; it reads the plain text of prompt and response "
            + ("as a text pair." if pair else "as one text."),
        )
        prompt = "\n".join(message["content"] for message in conversation)
        if pair:
            return self.tokenizer(prompt, response)
        bos = self.tokenizer.bos_token
        return self.tokenizer((prompt + response).removeprefix(bos or ""))  # the tokenizer adds BOS itself

    def _warn(self, key: str, text: str) -> None:
        """Once per reward model."""
        if key not in self._warned:
            self._warned.add(key)
            _logger.warning("reward_model=%s: %s", self.name, text)

    # -- token ids to scores

    def _batches(self, unique: Sequence[_Input]) -> Iterator[list[_Input]]:
        """Runs of inputs, sorted by length, of at most ``max_padded_tokens`` padded tokens each."""
        batch: list[_Input] = []
        for entry in unique:
            if batch and (len(batch) + 1) * len(entry.ids) > self._max_padded_tokens:
                yield batch
                batch = []
            batch.append(entry)
        if batch:
            yield batch

    def _forward_or_halves(self, batch: list[_Input]) -> list[float]:
        """One forward pass, or halves of it where memory does not suffice.

        The smaller size is not remembered: the split must not depend on the prompts that came before.
        """
        try:
            return self._forward(batch)
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
            if len(batch) == 1:
                raise OutOfMemoryError(
                    f"reward_model={self.name!r}: one sequence of {len(batch[0].ids)} tokens does not fit in memory.",
                    hint="reward_dtype=bfloat16, or another reward_device.",
                ) from error
        # outside the except block: the traceback would keep the failed pass's tensors alive
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        middle = len(batch) // 2
        return self._forward_or_halves(batch[:middle]) + self._forward_or_halves(batch[middle:])

    def _forward(self, batch: list[_Input]) -> list[float]:
        """Scores of one padded batch.

        Padding is always on the right, whatever the tokenizer prefers: there positions 0, 1, ... are right as they
        are, for models with learned, rotary and recurrent positions alike, and no real token ever attends to padding.
        """
        device = self.model.device
        lengths = torch.tensor([len(entry.ids) for entry in batch])
        longest = int(lengths.max())
        ids = torch.tensor([[*entry.ids, *[self._filler] * (longest - len(entry.ids))] for entry in batch])
        mask = torch.arange(longest) < lengths[:, None]  # (rows, longest)
        arguments = {"input_ids": ids.to(device), "attention_mask": mask.long().to(device)}
        if self._decoder is None:
            if batch[0].types:
                types = torch.tensor([[*entry.types, *[0] * (longest - len(entry.types))] for entry in batch])
                arguments["token_type_ids"] = types.to(device)
            scores = self.model(**arguments).logits[:, 0].float()
        else:
            hidden = self._decoder.base(**arguments, use_cache=False)[0]  # (rows, longest, hidden size)
            last = hidden[torch.arange(len(batch), device=hidden.device), (lengths - 1).to(hidden.device)]
            scores = torch.nn.functional.linear(last.float(), self._decoder.weight, self._decoder.bias)[:, 0]
        self.num_calls += 1
        self.tokens_scored += int(lengths.sum())
        values: list[float] = scores.tolist()
        return values


class _Input(NamedTuple):
    """What the model reads for one row."""

    ids: tuple[int, ...]
    types: tuple[int, ...]
    """Segment ids of a text pair; empty where the tokenizer has none."""


class _Decoder(NamedTuple):
    """A decoder checkpoint taken apart: the model below the head, and the head in float32."""

    base: Any
    weight: torch.Tensor  # (1, hidden size)
    bias: torch.Tensor | None


def _decoder_parts(model: Any) -> _Decoder | None:
    """None for a model that pools in its own way: no linear ``score`` head on a base model."""
    head = getattr(model, "score", None)
    base = getattr(model, model.base_model_prefix, None)
    if not isinstance(head, torch.nn.Linear) or base is None:
        return None
    return _Decoder(base, head.weight.detach().float(), head.bias.detach().float() if head.bias is not None else None)


def _max_length(config: Any, tokenizer: Any) -> int | None:
    """Most tokens the model reads: the smaller of what model and tokenizer say; None if neither says."""
    text_config = config.get_text_config()
    stated = [getattr(text_config, name, None) for name in ("max_position_embeddings", "n_positions")]
    stated.append(tokenizer.model_max_length)
    limits = [int(limit) for limit in stated if limit is not None and 0 < limit < _NO_LIMIT]
    return min(limits, default=None)


def _merged(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """The same conversation with its system messages put before the first user message."""
    system = [message["content"] for message in messages if message["role"] == "system"]
    rest = [dict(message) for message in messages if message["role"] != "system"]
    for message in rest:
        if message["role"] == "user":
            message["content"] = "\n\n".join([*system, message["content"]])
            return rest
    return [{"role": "user", "content": "\n\n".join(system)}, *rest] if system else rest


def _is_out_of_memory(error: RuntimeError) -> bool:
    # torch's CPU allocator raises a plain RuntimeError
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
