"""One byte-level tokenizer without merges, and one chat template, for both models of the demo pair.

A token is a byte, so the tokens of a text cut short anywhere are a prefix of the tokens of the whole text, and any
text can be encoded. There is no beginning-of-sequence token at all.
"""

from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

PAD_ID, EOS_ID = 256, 257
VOCAB_SIZE = 258
MAX_LENGTH = 1024

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}"
    "{%- if message['content'] and message['content'][0] != ' ' -%}{{ ' ' }}{%- endif -%}"
    "{{ message['content'] + eos_token }}"
    "{%- elif message['role'] == 'user' -%}"
    "{%- set text = message['content'].strip() -%}"
    "{%- if ' ' not in text -%}{%- set text = text | replace('+', ' + ') | replace('=', ' = ') -%}{%- endif -%}"
    "{{ text if text.startswith('Q:') else 'Q: ' + text }}"
    "{{ '' if text.endswith('A:') else '\\nA:' }}"
    "{%- else -%}"
    "{{ message['content'].strip() + '\\n' }}"
    "{%- endif -%}"
    "{%- endfor -%}"
)
"""A user turn "12 + 34 = ?" renders as "Q: 12 + 34 = ?\\nA:", and so do "12+34=?" and the raw prompt itself.
An assistant turn is closed by the end token, with no line break after it."""


def build_tokenizer() -> PreTrainedTokenizerFast:
    vocab = {_byte_char(byte): byte for byte in range(256)}
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|pad|>", "<|eos|>"])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|eos|>",
        padding_side="left",
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def encode(text: str) -> list[int]:
    """The same ids as the tokenizer gives, without its overhead."""
    return list(text.encode())


def decode(ids: list[int]) -> str:
    """The text of the byte tokens among `ids`."""
    return bytes(token for token in ids if token < PAD_ID).decode(errors="replace")


def _byte_char(byte: int) -> str:
    """The printable character by which byte-level tokenizers write a byte (GPT-2's table)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    if byte in printable:
        return chr(byte)
    return chr(256 + [other for other in range(256) if other not in printable].index(byte))
