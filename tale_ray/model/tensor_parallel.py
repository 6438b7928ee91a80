"""Which weights the processes of a gang split, and which each of them holds whole. Pure: knows names and sizes only.

A model of transformers brings rules, "layers.*.mlp.up_proj": "colwise", for the modules that can be split. The rules of
one attention or feed-forward part belong together: it is split as a whole where its heads, or its width, can be dealt
out evenly, and held whole otherwise. Embedding, norms and head are always held whole.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from tale_ray.errors import ModelError

WHOLE = "replicate"  # the rule of a module that every process holds whole, as transformers calls it

_COLUMNS = frozenset(("colwise", "colwise_rep", "colwise_gather_output", "packed_colwise"))
_ROWS = frozenset(("rowwise", "rowwise_rep", "rowwise_split_input"))
_KNOWN = _COLUMNS | _ROWS | {"moe_tp_experts", "replicated_with_grad_allreduce"}
_ATTENTION, _MLP, _EXPERTS, _SHARED = "attention", "feed-forward", "experts", "shared experts"
_PARTS = {  # by what families call the module
    **dict.fromkeys(("self_attn", "attention", "attn"), _ATTENTION),
    **dict.fromkeys(("mlp", "feed_forward", "block_sparse_moe", "moe"), _MLP),
    "experts": _EXPERTS,
    **dict.fromkeys(("shared_expert", "shared_experts"), _SHARED),
}
_HEADS = ("num_attention_heads", "n_head", "n_heads")
_WIDTHS = ("intermediate_size", "ffn_dim", "n_inner")
_FIELDS = {  # of the configuration that say how a part can be dealt out: the first that is there counts
    _MLP: _WIDTHS,
    _EXPERTS: ("moe_intermediate_size", *_WIDTHS),
    _SHARED: ("shared_expert_intermediate_size", "moe_intermediate_size"),
}


def split_plan(rules: Mapping[str, str], fields: Mapping[str, Any], num_members: int) -> dict[str, str]:
    """Return the rule of every module that `rules` name: its own where it is split, `WHOLE` where it is not.

    Args:
        rules: of the model, style by module name; layer numbers are written `*`.
        fields: of the decoder's configuration.
        num_members: processes of a gang.

    Raises:
        ModelError: the family has no rules for its layers, or nothing can be split among so many.
    """
    family = fields.get("model_type")
    groups = _groups(rules)
    if not groups:
        raise ModelError(
            f"a model of the family {family} cannot be split among {num_members} processes: transformers has no "
            "tensor-parallel plan for its layers; leave out --tensor-parallel (--gpus-per-worker deals out its layers)"
        )
    split = {
        name
        for group, names in groups.items()
        for name in names
        if _is_splittable({rules[name] for name in names}) and _divides(num_members, _sizes(_part(group), fields))
    }
    if not split:
        parts = sorted({_part(group) for group in groups})
        raise ModelError(_nothing_splits(family, {part: _sizes(part, fields) for part in parts}, num_members))
    return {name: rule if name in split else WHOLE for name, rule in rules.items()}


def check_sizes(fields: Mapping[str, Any], num_members: int) -> None:
    """Refuse a gang among which nothing can be split, as far as the fields of config.json tell: maybe not everything.

    Raises:
        ModelError: neither heads nor widths can be dealt out evenly.
    """
    told: dict[str, tuple[int, ...]] = {}
    for part in (_ATTENTION, _MLP, _EXPERTS, _SHARED):
        sizes = _sizes(part, fields)
        if sizes and sizes not in told.values():  # without a width of their own, experts have that of the others
            told[part] = sizes
    if {_ATTENTION, _MLP} <= told.keys() and not any(_divides(num_members, found) for found in told.values()):
        raise ModelError(_nothing_splits(fields.get("model_type"), told, num_members))


def held_whole(plan: Mapping[str, str], fields: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the parts of layers that a plan leaves whole, with their sizes, in words: `attention (9 and 3 heads)`."""
    groups = _groups(plan)
    parts = dict.fromkeys(_part(group) for group, names in groups.items() if {plan[name] for name in names} == {WHOLE})
    return tuple(_in_words(part, _sizes(part, fields)) for part in parts)


def _groups(rules: Mapping[str, str]) -> dict[str, list[str]]:
    """Return the names of the rules of each attention or feed-forward part, by the name of its module."""
    groups: dict[str, list[str]] = {}
    for name in rules:
        is_module = any(other.startswith(f"{name}.") for other in rules)
        group = name if is_module else name.rpartition(".")[0]
        if group.rpartition(".")[2] in _PARTS:
            groups.setdefault(group, []).append(name)
    return groups


def _part(group: str) -> str:
    return _PARTS[group.rpartition(".")[2]]


def _is_splittable(styles: set[str]) -> bool:
    """Return whether columns are split and then rows, so that a sum over processes ends the part; all of it known."""
    return bool(styles & _COLUMNS) and bool(styles & _ROWS) and styles <= _KNOWN


def _divides(num_members: int, sizes: tuple[int, ...]) -> bool:
    return bool(sizes) and all(size % num_members == 0 for size in sizes)


def _sizes(part: str, fields: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the numbers that have to be dealt out evenly; none: the configuration does not tell."""
    if part == _ATTENTION:
        heads = next((found for name in _HEADS if (found := tuple(_numbers(fields.get(name))))), ())
        others = [number for name in fields if name.endswith("key_value_heads") for number in _numbers(fields[name])]
        return tuple(dict.fromkeys((*heads, *others))) if heads else ()
    return next((found for name in _FIELDS[part] if (found := tuple(dict.fromkeys(_numbers(fields.get(name)))))), ())


def _numbers(value: Any) -> Iterator[int]:
    """Yield the number in a field, or those of all layers."""
    for item in value if isinstance(value, list | tuple) else (value,):
        if isinstance(item, int) and not isinstance(item, bool) and item > 0:
            yield item


def _nothing_splits(family: Any, sizes: Mapping[str, tuple[int, ...]], num_members: int) -> str:
    parts = "; ".join(_in_words(part, found) for part, found in sizes.items())
    return (
        f"a model of the family {family} cannot be split among {num_members} processes, as nothing in its layers is "
        f"divisible by {num_members}: {parts}. Give --tensor-parallel a number that divides some of them, or leave it "
        "out"
    )


def _in_words(part: str, sizes: tuple[int, ...]) -> str:
    numbers = " and ".join(map(str, sizes)) or "unknown"
    return f"{part} ({numbers} {'heads' if part == _ATTENTION else 'wide'})"
