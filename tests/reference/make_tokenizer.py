"""Writes the test tokenizer tests/testdata/tokenizer and its golden file.

    python3 tests/reference/make_tokenizer.py            # golden file from the committed model
    python3 tests/reference/make_tokenizer.py --train    # trains tokenizer.model anew first

README.md here says what the golden file holds and by which rules.
"""

import argparse
import io
import json
import os
import re

import sentencepiece

_FOLDER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "testdata", "tokenizer")
_PIECES = 400
_IM_START, _IM_END = "<|im_start|>", "<|im_end|>"

_TEXT = """
The lighthouse keeper counted the waves and wrote the number down in a small grey book.
He had done so every evening since the storm, and nobody had ever asked him why.
In the morning the fishing boats came back with empty nets, and the men stood on the quay, talking.
"The sea is tired," said the oldest of them, "and it is waiting for something that we cannot see."
A girl with a red scarf asked what the sea could be waiting for, \
and the men laughed at the question.
She went up to the lighthouse, 112 steps, and she found the keeper asleep over his numbers.
There were 4096 lines in the book; each of them held a date, a time, and the height of the water.
She turned the pages slowly. The numbers rose and fell, rose and fell, like somebody breathing.
"It is not waiting," she said when the keeper opened his eyes. "It is sleeping, and it dreams."
They listened together. Under the wind there was a sound, low and even, \
that neither had heard before.
When the winter was over the water was warm, the nets were heavy, and the book was full.
The keeper gave it to the girl, who took it home, and she began to read it to the whole village.
What is written down can wait; what is remembered has to be told again and again.
Nobody knows how long the night is, but the light goes round, and the boats come home.
if (count > 0) { return the_sum / count; } else { return 0; }
for (int i = 0; i < 10; ++i) { print("line", i); }
Der Leuchtturm steht am Meer. La mer dort encore. El mar duerme todavia.
Questions? Yes: who, when, where, why, how many, and for whom!
"""

_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + "
    "message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")

_TEXTS = [
    "", " ", "  ", "\n", "\n\n\n", "\t", " \n \t ", "a", " a", "a ", "  a  b   c    ",
    "The lighthouse keeper counted the waves.", " The lighthouse", "The  lighthouse\n\nkeeper\n",
    "\nThe sea", "line one\r\nline two\r\n", "1234567890", "3.14159, -2.5e-8", "UPPER lower MiXeD",
    "for (int i = 0; i < 10; ++i) {\n\treturn i;\n}\n",
    "caf\u00e9 na\u00efve \u00fcber \u00df", "cafe\u0301 (combining accent)",
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002", "\u65e5\u672c\u8a9e\u306e\u6587\u7ae0",
    "\ud55c\uad6d\uc5b4",
    "\u0420\u0443\u0441\u0441\u043a\u0438\u0439 \u0442\u0435\u043a\u0441\u0442",
    "\u0627\u0644\u0639\u0631\u0628\u064a\u0629", "\u0939\u093f\u0928\u094d\u0926\u0940",
    "\U0001f600", "smile \U0001f600 and wave \U0001f44b\U0001f3fd",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 family",
    "\U0001f1e9\U0001f1ea\U0001f1ef\U0001f1f5", "\u2764\ufe0f",
    "mixed \u4e2d\u6587 and \U0001f680 text",
    "\ufeffbyte order mark", "\ufffd replacement \ufffd\ufffd",
    "\u00c3\u00a9 looks like a broken \u00e9",
    "\u00a0no-break\u3000ideographic\u2003em space", "zero\u200bwidth", "nul \u0000 byte",
    "control \u0001\u001f\u007f\u0085", "\U0010ffff last code point",
    "\uff26\uff55\uff4c\uff4c width \ufb01 ligature",
    "<0x41> is not a byte", "<|im_start|>", "<|im_end|>", "<|im_start|><|im_end|>",
    "<|im_start|>user\nHello<|im_end|>\n", "a<|im_start|>b", "a <|im_start|> b", " <|im_end|> ",
    "<|im_start|", "<|im_end|>>", "<<|im_end|>", "<|IM_END|>", "<|im_start|><|im_start|>x",
    "<s>", "</s>", "a<s>b</s>c", "the end.</s>", "ends with many spaces        ",
    "        begins with many spaces", "tab\tand\u000bvertical", "x" * 50, "the " * 12,
    "\u4e2d" * 9,
]

# The normalizer of the SentencePiece library writes a space as U+2581 and reads it back as a space:
# this character of a text comes back as a space.
_LOSSY_TEXTS = ["\u2581", "a\u2581b \u2581\u2581"]

# Bytes that are no UTF-8 or not yet: cut characters, stray continuation bytes, overlong forms,
# surrogates, beyond U+10FFFF. Given as byte pieces around ordinary ones.
_BYTE_SEQUENCES = [
    "e4", "e4bd", "e4bda0", "f09f98", "f09f9880", "80", "bfbf", "c3", "c3a9", "c328", "c0af",
    "e080af", "eda080", "f4908080", "ff", "fefe", "f09f98e4bda0", "41c342", "e4bd0a", "00", "0a",
    "efbfbd",
    "f09f9880f09f98", "20e4bd20",
]

_CHATS = [
    [{"role": "user", "content": "Hello"}],
    [{"role": "system", "content": "You tell stories of the sea."},
     {"role": "user", "content": "Tell me one, please.\nA short one."}],
    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Good evening."},
     {"role": "user", "content": "\u4f60\u597d \U0001f600"}],
    [{"role": "user", "content": ""}],
    [{"role": "user", "content": "  spaces around  \n"}],
]


def train():
    """tokenizer.model: BPE with byte fallback; the text is encoded as it is, nothing is added."""
    writer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for line in _TEXT.strip().splitlines()), model_writer=writer,
        model_type="bpe", vocab_size=_PIECES, byte_fallback=True, character_coverage=1.0,
        normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False,
        split_digits=True, unk_id=0, bos_id=1, eos_id=2, pad_id=-1, num_threads=1,
        minloglevel=2)
    with open(os.path.join(_FOLDER, "tokenizer.model"), "wb") as file:
        file.write(writer.getvalue())


def write_config():
    contents = {0: "<unk>", 1: "<s>", 2: "</s>", _PIECES: _IM_START, _PIECES + 1: _IM_END}
    added = {str(i): {"content": text, "lstrip": False, "normalized": False, "rstrip": False,
                      "single_word": False, "special": True} for i, text in contents.items()}
    config = {
        "add_bos_token": True, "add_eos_token": False, "added_tokens_decoder": added,
        "additional_special_tokens": [_IM_START, _IM_END], "bos_token": "<s>",
        "chat_template": _CHAT_TEMPLATE, "clean_up_tokenization_spaces": False, "eos_token": "</s>",
        "legacy": True, "model_max_length": 8192, "pad_token": None, "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer", "unk_token": "<unk>",
        "use_default_system_prompt": False,
    }
    with open(os.path.join(_FOLDER, "tokenizer_config.json"), "w", encoding="utf-8") as file:
        json.dump(config, file, indent=2)
        file.write("\n")


class Tokenizer:
    """Splits at added tokens, then encodes each stretch between them with SentencePiece."""

    def __init__(self, folder):
        self.pieces = sentencepiece.SentencePieceProcessor(
            model_file=os.path.join(folder, "tokenizer.model"))
        with open(os.path.join(folder, "tokenizer_config.json"), encoding="utf-8") as file:
            config = json.load(file)
        self.added = {entry["content"]: int(i)
                      for i, entry in config["added_tokens_decoder"].items()}
        self.special = {int(i) for i, entry in config["added_tokens_decoder"].items()
                        if entry["special"]}
        # Leftmost match; of several at one place the longest.
        longest_first = sorted(self.added, key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")

    def encode(self, text):
        ids = []
        for part in self._split.split(text):
            if part in self.added:
                ids.append(self.added[part])
            elif part:
                ids += self.pieces.encode(part)
        return ids

    def bytes_of(self, token):
        """The bytes that one id stands for, special tokens spelled out."""
        for text, i in self.added.items():
            if i == token:
                return text.encode()
        piece = self.pieces.id_to_piece(token)
        if self.pieces.is_byte(token):
            return bytes([int(piece[3:5], 16)])
        return piece.replace("\u2581", " ").encode()

    def decode(self, ids, keep_special):
        return b"".join(self.bytes_of(i) for i in ids if keep_special or i not in self.special)


def text_case(tokenizer, text):
    ids = tokenizer.encode(text)
    return {"text": text, "ids": ids,
            "decoded_hex": tokenizer.decode(ids, keep_special=True).hex(),
            "decoded_without_special_hex": tokenizer.decode(ids, keep_special=False).hex(),
            "bytes_hex": [tokenizer.bytes_of(i).hex() for i in ids]}


def decode_case(tokenizer, ids):
    decoded = tokenizer.decode(ids, keep_special=False)
    return {"ids": ids, "decoded_hex": decoded.hex(),
            "valid_utf8": decoded.decode("utf-8", "ignore").encode() == decoded,
            "replaced": decoded.decode("utf-8", "replace")}


def golden(tokenizer):
    texts = [text_case(tokenizer, text) for text in _TEXTS]
    for case in texts:
        assert bytes.fromhex(case["decoded_hex"]).decode() == case["text"], case
    byte_zero = tokenizer.pieces.piece_to_id("<0x00>")
    words = tokenizer.encode("The sea"), tokenizer.encode(" is tired")
    sequences = []
    for sequence in _BYTE_SEQUENCES:
        ids = [byte_zero + byte for byte in bytes.fromhex(sequence)]
        sequences += [ids, words[0] + ids + words[1]]
    sequences += [[], [1], [1] + words[0] + [2], [_PIECES] + words[0] + [_PIECES + 1], words[1]]
    chats = []
    for messages in _CHATS:
        text = "".join(f"{_IM_START}{m['role']}\n{m['content']}{_IM_END}\n" for m in messages)
        text += f"{_IM_START}assistant\n"
        chats.append({"messages": messages, "text": text, "ids": tokenizer.encode(text)})
    return {
        "pieces": tokenizer.pieces.get_piece_size(),
        "vocabulary": tokenizer.pieces.get_piece_size() + 2,
        "bos_id": 1, "eos_id": 2, "unk_id": 0, "first_byte_id": byte_zero,
        "added_tokens": {text: i for text, i in tokenizer.added.items()},
        "texts": texts, "lossy_texts": [text_case(tokenizer, text) for text in _LOSSY_TEXTS],
        "decode": [decode_case(tokenizer, ids) for ids in sequences], "chats": chats,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", action="store_true", help="train tokenizer.model anew")
    args = parser.parse_args()
    os.makedirs(_FOLDER, exist_ok=True)
    if args.train:
        train()
        write_config()
    tokenizer = Tokenizer(_FOLDER)
    found = golden(tokenizer)
    lines = []
    for key, value in found.items():
        if isinstance(value, list):
            rows = ",\n".join("  " + json.dumps(case) for case in value)
            lines.append(f' "{key}": [\n{rows}\n ]')
        else:
            lines.append(f' "{key}": {json.dumps(value)}')
    path = os.path.join(_FOLDER, "golden.json")
    with open(path, "w", encoding="utf-8") as file:
        file.write("{\n" + ",\n".join(lines) + "\n}\n")
    print(f"{path}: {len(found['texts'])} texts, {len(found['decode'])} id sequences, "
          f"{len(found['chats'])} chats, {found['pieces']} pieces")


if __name__ == "__main__":
    main()
