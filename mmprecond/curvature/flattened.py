"""Linear layers behind a flattened feature map, whose inputs are channels x positions."""

from __future__ import annotations

from typing import Any

from torch import nn

#: Branches of a box head whose first linear layer may read the feature map, each with the branches
#: that come before it.
BRANCHES: dict[str, tuple[str, ...]] = {
    'shared_fcs': (),
    'fc_branch': (),
    'cls_fcs': ('shared_fcs',),
    'reg_fcs': ('shared_fcs',),
    'fc_cls': ('shared_fcs', 'cls_fcs', 'fc_branch'),
    'fc_reg': ('shared_fcs', 'reg_fcs', 'fc_branch'),
}


def find_flattened(model: nn.Module) -> dict[nn.Module, int]:
    """Number of positions of the linear layers that read a box head's flattened feature map.

    A box head is a `BBoxHead` of MMDetection, told by the name of its class or a base class, with a
    number `roi_feat_area`. Its layer reads the map if it is the first of its branch and has
    `roi_feat_area` inputs for each channel of the map. The order of these inputs is that of a
    patch: channels, then positions. Layers inside submodules are not considered, because they may
    have another order (`DynamicConv` of Sparse R-CNN has).

    Args:
        model: The model.

    Returns:
        Positions by module; a layer that is missing here has one position.
    """
    found: dict[nn.Module, int] = {}
    for head in model.modules():
        area = getattr(head, 'roi_feat_area', 1)
        if isinstance(area, int) and area > 1 and _is_box_head(head):
            for branch, before in BRANCHES.items():
                layer = _first_layer(head, branch)
                preceded = any(_first_layer(head, name) for name in before)
                if layer is not None and not preceded and _reads_map(head, branch, layer, area):
                    found[layer] = area
    return found


def _is_box_head(module: nn.Module) -> bool:
    return 'BBoxHead' in [kind.__name__ for kind in type(module).__mro__]


def _first_layer(head: nn.Module, branch: str) -> nn.Linear | None:
    """First linear layer of a branch, which is a layer itself or a list of layers."""
    part: Any = getattr(head, branch, None)
    if isinstance(part, nn.ModuleList):
        part = part[0] if len(part) else None
    return part if isinstance(part, nn.Linear) else None


def _reads_map(head: Any, branch: str, layer: nn.Linear, area: int) -> bool:
    """True if a layer has `area` inputs for each channel of the feature map."""
    if getattr(head, 'with_avg_pool', False) and branch != 'fc_branch':
        return False  # in `DoubleConvFCBBoxHead` only the convolutional branch is pooled
    channels = (getattr(head, name, None) for name in ('in_channels', 'conv_out_channels'))
    return layer.in_features in [count * area for count in channels if isinstance(count, int)]
