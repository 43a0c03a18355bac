"""Assignment of preconditioners to the layers of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from ..preconditioners import METHODS, Preconditioner, build_preconditioner

MATCH_KEYS = ('module_type', 'name')
ENTRY_KEYS = ('match', 'preconditioner')


@dataclass(frozen=True)
class Entry:
    """A preconditioner (None: the plain rule) for the layers that meet both conditions.

    Attributes:
        preconditioner: The preconditioner.
        module_types: Class names that the layer's module, or a module around it, may have. None
            means all.
        name: Pattern as in `fnmatch` for the dotted name of the layer's module, or of a module
            around it. None means all.
    """

    preconditioner: Preconditioner | None
    module_types: tuple[str, ...] | None = None
    name: str | None = None

    @property
    def is_open(self) -> bool:
        """True if the entry applies to all remaining layers."""
        return self.module_types is None and self.name is None

    def meets(self, path: Sequence[tuple[str, nn.Module]]) -> bool:
        """True if the entry matches a module, given with all modules around it."""
        return (
            self.module_types is None or any(type(m).__name__ in self.module_types for _, m in path)
        ) and (self.name is None or any(fnmatchcase(n, self.name) for n, _ in path))

    @property
    def match(self) -> str:
        """The conditions in a config's notation."""
        types = self.module_types
        parts = {'module_type': types[0] if types and len(types) == 1 else types, 'name': self.name}
        conditions = (f'{key}={value!r}' for key, value in parts.items() if value is not None)
        return f'dict({", ".join(conditions)})'


class Assignment:
    """Ordered list of entries; the first entry that matches a layer wins.

    Args:
        entries: The entries, or one preconditioner for all layers.
    """

    def __init__(self, entries: Sequence[Entry] | Preconditioner) -> None:
        self.entries = [Entry(entries)] if isinstance(entries, Preconditioner) else list(entries)

    def bind(self, model: nn.Module) -> BoundAssignment:
        """Binds the assignment to a model.

        Raises:
            ValueError: If an entry matches no module.
        """
        return BoundAssignment(self.entries, model)

    @property
    def methods(self) -> list[Preconditioner]:
        """The preconditioners, in order."""
        return [e.preconditioner for e in self.entries if e.preconditioner is not None]


class BoundAssignment:
    """Assignment for one model (see `Assignment.bind`)."""

    def __init__(self, entries: list[Entry], model: nn.Module) -> None:
        self.entries = entries
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.names: dict[nn.Module, list[str]] = {}
        for name, module in self.modules.items():
            self.names.setdefault(module, []).append(name)
        for position, entry in enumerate(entries):
            if not any(entry.meets(self._path(name)) for name in self.modules):
                kinds = sorted({type(m).__name__ for m in self.modules.values()})
                raise ValueError(
                    f'layers[{position}]: match={entry.match} hits nothing in '
                    f'{type(model).__name__}; its module types are {_join_names(kinds)}, its '
                    'names begin with '
                    f'{_join_names([n for n in self.modules if n and "." not in n])}'
                )

    def entry(self, name: str) -> Entry | None:
        """The entry for a layer, by the dotted name of its module."""
        path = self._path(name)
        return next((entry for entry in self.entries if entry.meets(path)), None)

    def method(self, name: str) -> Preconditioner | None:
        """The preconditioner for a layer, or None for the plain rule."""
        entry = self.entry(name)
        return entry.preconditioner if entry else None

    def check_use(self, names: Sequence[str]) -> None:
        """Raises ValueError if an entry can never be used.

        Args:
            names: Names of the layers that can be preconditioned.
        """
        used_entries = [self.entry(name) for name in names]
        for position, entry in enumerate(self.entries):
            met = any(entry.meets(self._path(name)) for name in names)
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
            if not met and entry.preconditioner is not None and not entry.is_open:
                raise ValueError(
                    f'layers[{position}]: match={entry.match} is of no use, because it hits '
                    'no layer that can be preconditioned'
                )

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
        layers: List of ``dict(match=..., preconditioner=...)``, see `Preconditioned`.

    Raises:
        ValueError: If the list is invalid; the message says what to write instead.
    """
    if not isinstance(layers, (list, tuple)) or not layers:
        raise ValueError(
            f'layers={layers!r} is not a list of entries; write '
            "layers=[dict(preconditioner=dict(type='NewtonKronecker'))]"
        )
    return Assignment([_parse_entry(f'layers[{k}]', entry) for k, entry in enumerate(layers)])


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
    return Entry(
        _parse_method(where, entry['preconditioner']), None if types is None else tuple(types), name
    )


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
    method = METHODS.get(kind) if isinstance(kind, str) else kind
    if not (isinstance(method, type) and issubclass(method, Preconditioner)):
        raise ValueError(f'{where}: unknown preconditioner type {kind!r}; choose one of {names}')
    if method.precomputed:
        raise ValueError(
            f'{where}: {method.__name__} is never measured; its statistics are given '
            'by calibrate_first_layer of MAC'
        )
    _reject_keys(f'{where}: {method.__name__}', settings, [*method.options(), 'settings'])
    try:
        return build_preconditioner(method, settings)
    except ValueError as error:
        raise ValueError(f'{where}: {error}') from error


def _reject_keys(where: str, config: dict[str, Any], known: Sequence[str]) -> None:
    unknown = sorted(set(map(str, config)) - set(known))
    if unknown:
        raise ValueError(f'{where} does not take {", ".join(unknown)}; it takes {", ".join(known)}')


def _join_names(names: list[str], limit: int = 12) -> str:
    suffix = f' and {len(names) - limit} more' if len(names) > limit else ''
    return ', '.join(names[:limit]) + suffix
