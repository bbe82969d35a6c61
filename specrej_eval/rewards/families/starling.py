"""Starling-RM: a linear head at the last token of Llama-2-7B-chat, or of Yi-34B.

Source: Zhu et al., "Starling-7B" (2023), the model cards of berkeley-nest/Starling-RM-7B-alpha and
Nexusflow/Starling-RM-34B, and reward-bench's ``starling.py``.

The 7B model is published as one raw ``.pt`` file: body under ``transformer.`` (and once more under ``model.model.``),
head ``v_head.weight``. Config and tokenizer are those of the gated meta-llama/Llama-2-7b-chat-hf. Its card reads
"<s>[INST] Hello? </s> [/INST] Hi, how can I help you?</s>", end token before [/INST] included, through a tokenizer that
puts another <s> in front; we do as the card does. The 34B model reads Yi's ChatML without BOS and has Yi's tokenizer.

We differ in the last token: the original looks for the first <unk> (its padding); here it is the last token read.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from specrej_eval import checkpoint
from specrej_eval.companions import CONFIG_ELSEWHERE, STARLING_TOKENIZERS
from specrej_eval.errors import CheckpointError
from specrej_eval.paths import expanded
from specrej_eval.rewards.checkpoints.family import RewardCheckpoint, RewardFamily
from specrej_eval.rewards.checkpoints.native import LastToken, assemble, body_config, fill, load_body, read_tensors
from specrej_eval.rewards.checkpoints.renderer import TextRenderer
from specrej_eval.rewards.checkpoints.reward import CheckpointReward

LLAMA_TEMPLATE = (
    "{{ bos_token }}"  # the tokenizer's; the text has its own
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'system' -%}{{ raise_exception('no system messages') }}"
    "{%- elif message['role'] == 'user' -%}"
    "{{ bos_token + '[INST] ' + message['content'] + ' ' + eos_token + ' [/INST]' }}"
    "{%- else -%}{{ ' ' + message['content'] + eos_token }}{%- endif -%}"
    "{%- endfor -%}"
)
CHATML_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if not loop.first -%}{{ '\n' }}{%- endif -%}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '\n<|im_start|>assistant\n' }}{%- endif -%}"
)
_RAW_WEIGHTS = "*.pt"
_YI_VOCAB_SIZE = 64_000
"""Llama-2's vocabulary is half as large: this tells the two bodies, and so their templates, apart."""


class Family(RewardFamily):
    READS = "a linear head at the last token; from a raw .pt file (7B) or under other names (34B)"
    EXAMPLES = ("berkeley-nest/Starling-RM-7B-alpha", "Nexusflow/Starling-RM-34B")
    NEEDS = (
        "for the 7B model, access to meta-llama/Llama-2-7b-chat-hf (gated: config, tokenizer), or a folder that holds "
        "them"
    )
    BY_NAME = True  # the 7B checkpoint has no config, the 34B one's is a sequence classifier's

    def config_from(self, name: str) -> str | None:
        return CONFIG_ELSEWHERE.get(Path(name).name)

    def check_files(self, folder: Path) -> None:
        """A raw .pt file will do, and the tokenizer may be another checkpoint's."""
        if not any(folder.glob(_RAW_WEIGHTS)):
            checkpoint.check_weights("reward_model", folder)
        if folder.name not in STARLING_TOKENIZERS:
            checkpoint.check_tokenizer_files("reward_model", folder)

    def load(self, source: RewardCheckpoint) -> CheckpointReward:
        model_config = body_config(source.name, source.raw)
        folder = expanded(source.name)
        bare = any(folder.glob(_RAW_WEIGHTS)) if folder.is_dir() else folder.name in CONFIG_ELSEWHERE
        tensors = read_tensors(
            source, lambda key: key.startswith(("transformer.", "v_head.")), pattern=_RAW_WEIGHTS if bare else None
        )
        body, tokenizer = load_body(
            source,
            model_config=model_config,
            state=_body_state(source.name, tensors),
            tokenizer_from=None if checkpoint.has_tokenizer(folder) else STARLING_TOKENIZERS.get(folder.name),
        )
        head = fill(source, nn.Linear(model_config.hidden_size, 1, bias=False), tensors, "v_head.")
        template = CHATML_TEMPLATE if model_config.vocab_size >= _YI_VOCAB_SIZE else LLAMA_TEMPLATE
        return assemble(source, body, tokenizer, LastToken(head), renderer_class=TextRenderer, template=template)


def _body_state(name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    state = {key.removeprefix("transformer."): tensors[key] for key in tensors if key.startswith("transformer.")}
    if not state:
        raise CheckpointError(
            f"reward_model={name!r} has no weights under 'transformer.'.",
            hint="is this the reward model, or the language model it was made from?",
        )
    # older versions of transformers stored what is computed from the config
    return {key: tensor for key, tensor in state.items() if not key.endswith("rotary_emb.inv_freq")}
