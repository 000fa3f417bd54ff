"""Rope scaling makes contexts longer, by options of a model's configuration; HOMER is combined with it.

`linear:F` divides positions by F (position interpolation), `ntk:F` raises the base to F^(d/(d-2)) times its value (NTK
aware, static), `yarn:F` mixes both by frequency. Each makes another reader: banks and bias tables are its own.
"""

import re
from typing import Any

from model_worker.errors import InputError

_FORM = re.compile(r"(linear|ntk|yarn):(\d+(?:\.\d+)?)")


def scale_rope(config: Any, spec: str) -> None:
    """Change `config` in place before the model is built from it. Raises InputError for what cannot be scaled."""
    form = _FORM.fullmatch(spec)
    if form is None or float(form[2]) < 1:
        raise InputError(f"rope {spec!r}: write linear:F, ntk:F or yarn:F, with F of at least 1")
    kind, factor = form[1], float(form[2])
    rope = dict(getattr(config, "rope_parameters", None) or {})
    if rope.get("rope_type", "default") != "default" or "rope_theta" not in rope:
        raise InputError(f"a model with rope parameters {rope} is not scaled further")
    trained = config.max_position_embeddings
    if kind == "ntk":
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        rope["rope_theta"] *= factor ** (dim / (dim - 2))
    else:
        rope |= {"rope_type": kind, "factor": factor}
        if kind == "yarn":
            rope["original_max_position_embeddings"] = trained
    config.rope_parameters = rope
    config.max_position_embeddings = int(trained * factor)
