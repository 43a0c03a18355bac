"""Assignment of preconditioners to the layers of a model."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from ..checks import did_you_mean, first_names
from ..curvature import AttentionTypes
from ..preconditioners import METHODS, Preconditioner, build_preconditioner, find_method

MATCH_KEYS = ('module_type', 'name', 'attention')
ENTRY_KEYS = ('match', 'preconditioner')
#: Keys of `layers` as a dict.
PARTS = ('attention', 'elsewhere')
#: What `layers` may be, for errors.
FORMS = (
    "'NKFAC' for all layers, 'AFOpt+NKFAC' (the first on attention modules), "
    "dict(attention='AFOpt', elsewhere='NKFAC'), or a list of entries "
    "[dict(preconditioner=dict(type='NewtonKronecker'))]"
)


@dataclass(frozen=True)
class Entry:
    """A preconditioner (None: the plain rule) for the layers that meet all conditions.

    Attributes:
        preconditioner: The preconditioner.
        module_types: Class names that the layer's module, or a module around it, may have. None
            means all.
        name: Pattern as in `fnmatch` for the dotted name of the layer's module, or of a module
            around it. None means all.
        attention: Whether the layer's module, or a module around it, must be an attention module
            that can be read as a whole.
        optional: Whether the entry may match nothing.
    """

    preconditioner: Preconditioner | None
    module_types: tuple[str, ...] | None = None
    name: str | None = None
    attention: bool = False
    optional: bool = False

    @property
    def is_open(self) -> bool:
        """True if the entry applies to all remaining layers."""
        return self.module_types is None and self.name is None and not self.attention

    def meets(self, path: Sequence[tuple[str, nn.Module]], readable: Container[nn.Module]) -> bool:
        """True if the entry matches a module.

        Args:
            path: The module and all modules around it, with their names.
            readable: Attention modules that can be read as a whole.
        """
        types, pattern = self.module_types, self.name
        return (
            (types is None or any(type(m).__name__ in types for _, m in path))
            and (pattern is None or any(fnmatchcase(n, pattern) for n, _ in path))
            and (not self.attention or any(m in readable for _, m in path))
        )

    @property
    def match(self) -> str:
        """The conditions in a config's notation."""
        types = self.module_types
        parts = {
            'module_type': types[0] if types and len(types) == 1 else types,
            'name': self.name,
            'attention': self.attention or None,
        }
        conditions = (f'{key}={value!r}' for key, value in parts.items() if value is not None)
        return f'dict({", ".join(conditions)})'


class Assignment:
    """Ordered list of entries; the first entry that matches a layer wins.

    Args:
        entries: The entries, or one preconditioner for all layers.
    """

    def __init__(self, entries: Sequence[Entry] | Preconditioner) -> None:
        self.entries = [Entry(entries)] if isinstance(entries, Preconditioner) else list(entries)

    def bind(self, model: nn.Module, types: AttentionTypes) -> BoundAssignment:
        """Binds the assignment to a model.

        Args:
            model: The model.
            types: What `attention_types` says of the model.

        Raises:
            ValueError: If an entry matches no module.
        """
        return BoundAssignment(self.entries, model, types)

    @property
    def reads_attention(self) -> bool:
        """True if an entry or a method asks for attention modules."""
        asked = any(entry.attention for entry in self.entries)
        return asked or any(method.attention_reading for method in self.methods)

    @property
    def methods(self) -> list[Preconditioner]:
        """The preconditioners, in order."""
        return [e.preconditioner for e in self.entries if e.preconditioner is not None]


class BoundAssignment:
    """Assignment for one model (see `Assignment.bind`)."""

    def __init__(self, entries: list[Entry], model: nn.Module, types: AttentionTypes) -> None:
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.names: dict[nn.Module, list[str]] = {}
        for name, module in self.modules.items():
            self.names.setdefault(module, []).append(name)
        self.readable = {m for m, (kind, reason) in types.items() if kind and not reason}
        missed = [e for e in entries if not any(self._meets(e, n) for n in self.modules)]
        self.entries = [entry for entry in entries if entry not in missed]
        for position, entry in enumerate(entries):
            if entry in missed and not entry.optional:
                kinds = sorted({type(m).__name__ for m in self.modules.values()})
                raise ValueError(
                    f'layers[{position}]: match={entry.match} hits nothing in '
                    f'{type(model).__name__}; its module types are {first_names(kinds, 12)}, its '
                    'names begin with '
                    f'{first_names([n for n in self.modules if n and "." not in n], 12)}'
                )

    def entry(self, name: str) -> Entry | None:
        """The entry for a layer, by the dotted name of its module."""
        return next((entry for entry in self.entries if self._meets(entry, name)), None)

    def method(self, name: str) -> Preconditioner | None:
        """The preconditioner for a layer, or None for the plain rule."""
        entry = self.entry(name)
        return entry.preconditioner if entry else None

    @property
    def open_method(self) -> Preconditioner | None:
        """The preconditioner of the entry for all remaining layers, if there is one."""
        return next((entry.preconditioner for entry in self.entries if entry.is_open), None)

    def check_use(self, names: Sequence[str]) -> None:
        """Raises ValueError if an entry can never be used.

        Args:
            names: Names of the layers that can be preconditioned.
        """
        used_entries = [self.entry(name) for name in names]
        for position, entry in enumerate(self.entries):
            met = any(self._meets(entry, name) for name in names)
            used = any(other is entry for other in used_entries)
            shadowed = (
                any(earlier.is_open for earlier in self.entries[:position])
                or met
                and not used
                and not entry.is_open
            )
            if shadowed:
                raise ValueError(
                    f'layers[{position}]: match={entry.match} is of no use, because all its '
                    'layers are taken by entries before it; put it first'
                )
            needed = entry.preconditioner is not None and not entry.optional
            if not met and needed and not entry.is_open:
                raise ValueError(
                    f'layers[{position}]: match={entry.match} is of no use, because it hits '
                    'no layer that can be preconditioned'
                )

    def _meets(self, entry: Entry, name: str) -> bool:
        return entry.meets(self._path(name), self.readable)

    def _path(self, name: str) -> list[tuple[str, nn.Module]]:
        """A module and the modules around it, under all their names."""
        path = []
        for alias in self.names[self.modules[name]]:
            parts = alias.split('.') if alias else []
            names = ['.'.join(parts[:k]) for k in range(len(parts) + 1)]
            path += [(n, self.modules[n]) for n in names]
        return path


def parse_layers(layers: Any) -> Assignment:
    """Reads the `layers` of a config.

    Args:
        layers: One of the forms that `Preconditioned` takes.

    Raises:
        ValueError: If it is none of them; the message says what to write instead.
    """
    if isinstance(layers, str):
        layers = split_words(layers)
    if isinstance(layers, dict) and layers:
        return Assignment(_parse_parts(layers))
    if not isinstance(layers, (list, tuple)) or not layers:
        raise ValueError(f'layers={layers!r} is not a list of entries: write {FORMS}')
    return Assignment([_parse_entry(f'layers[{k}]', entry) for k, entry in enumerate(layers)])


def split_words(words: str) -> dict[str, str]:
    """Reads 'NKFAC' or 'AFOpt+NKFAC' as the dict with the keys 'attention' and 'elsewhere'.

    Raises:
        ValueError: If there are more than two names, or an empty one.
    """
    names = [name.strip() for name in words.split('+')]
    if len(names) > len(PARTS) or not all(names):
        raise ValueError(f'layers={words!r}: write {FORMS}')
    return dict(zip(PARTS[-len(names) :], names, strict=True))


def _parse_parts(parts: dict[str, Any]) -> list[Entry]:
    """Entries of attention modules, if there are any, and of all other layers."""
    _reject_keys('layers', parts, PARTS)
    entries = []
    for part, config in parts.items():
        if isinstance(config, str):
            config = dict(type=config)
        attention = part == 'attention'
        method = _parse_method(f'layers: {part}', config)
        entries.append(Entry(method, attention=attention, optional=attention))
    return sorted(entries, key=lambda entry: entry.is_open)


def _parse_entry(where: str, entry: Any) -> Entry:
    if not isinstance(entry, dict) or 'preconditioner' not in entry:
        raise ValueError(
            f'{where}={entry!r} names no preconditioner; write '
            "dict(match=..., preconditioner=dict(type='NewtonKronecker')), or "
            'preconditioner=None for the plain rule'
        )
    _reject_keys(where, entry, ENTRY_KEYS)
    match = {} if entry.get('match') is None else entry['match']
    if not isinstance(match, dict):
        raise ValueError(
            f"{where}: match={match!r} is no dict; write match=dict(name='backbone.*')"
            " or match=dict(module_type='WindowMSA')"
        )
    _reject_keys(f'{where}: match', match, MATCH_KEYS)
    types, name = match.get('module_type'), match.get('name')
    types = (types,) if isinstance(types, str) else types
    listed = isinstance(types, (list, tuple)) and types
    if types is not None and not (listed and all(isinstance(t, str) for t in types)):
        raise ValueError(
            f'{where}: module_type={types!r} is neither a class name nor a list of '
            "class names; write module_type='WindowMSA'"
        )
    if name is not None and not isinstance(name, str):
        raise ValueError(f"{where}: name={name!r} is no pattern; write name='backbone.*'")
    attention = match.get('attention', False)
    if not isinstance(attention, bool):
        raise ValueError(f'{where}: attention={attention!r} is no bool; write attention=True')
    method = _parse_method(where, entry['preconditioner'])
    return Entry(method, None if types is None else tuple(types), name, attention)


def _parse_method(where: str, config: Any) -> Preconditioner | None:
    if config is None:
        return None
    names = ', '.join(sorted(METHODS))
    if not isinstance(config, dict) or 'type' not in config:
        raise ValueError(
            f'{where}: preconditioner={config!r} has no type; write '
            f'preconditioner=dict(type=...) with one of {names}'
        )
    settings = dict(config)
    kind = settings.pop('type')
    try:
        method, preset = find_method(kind)
    except ValueError as error:
        raise ValueError(f'{where}: {error}') from None
    if method.precomputed:
        raise ValueError(
            f'{where}: {method.__name__} is never measured; its statistics are given '
            'by calibrate_first_layer of MAC'
        )
    _reject_keys(f'{where}: {method.__name__}', settings, [*method.options(), 'settings'])
    try:
        return build_preconditioner(method, settings, preset)
    except ValueError as error:
        raise ValueError(f'{where}: {error}') from error


def _reject_keys(where: str, config: dict[str, Any], known: Sequence[str]) -> None:
    unknown = sorted(set(map(str, config)) - set(known))
    if unknown:
        near = did_you_mean(unknown[0], known)
        raise ValueError(
            f'{where} does not take {", ".join(unknown)}; {near}it takes {", ".join(known)}'
        )
