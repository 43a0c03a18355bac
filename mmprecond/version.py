"""The version of mmprecond and the oldest torch that it works with; setup.py reads both."""

__version__ = '0.1.0'
#: torch.compiler.set_stance came with it, without which compiled models are not measured.
MIN_TORCH = '2.6'


def check_torch(version: str) -> None:
    """Raises ImportError for a torch that is too old."""
    number = tuple(int(part) for part in version.split('+')[0].split('.')[:2])
    if number < tuple(int(part) for part in MIN_TORCH.split('.')):
        raise ImportError(f'mmprecond needs torch {MIN_TORCH} or later; this is torch {version}')
