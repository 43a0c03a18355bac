"""Trajectories of the authors' published codes, recorded in float64 on tiny problems."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import mmprecond.optimizers
from tests.support.networks import ConvNet, MatrixNet, TokenNet, squared_error
from tests.support.paths import GOLDEN

#: Networks, and names of their data.
MODELS = {
    'conv': (ConvNet, 'conv'),
    'token': (TokenNet, 'token'),
    'matrix': (MatrixNet, 'token'),
}
CASES = sorted(p.stem for p in GOLDEN.glob('*.npz') if not p.stem.startswith('data'))


@pytest.mark.parametrize('case', CASES)
def test_trajectory(case: str) -> None:
    golden = np.load(GOLDEN / f'{case}.npz')
    meta = json.loads(str(golden['meta']))
    network, data_name = MODELS[meta['model']]
    data = np.load(GOLDEN / f'data-{data_name}.npz')
    model = network().double()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.from_numpy(golden[f'init/{name}']))
    hyper = {
        key: value for key, value in meta['hyper'].items() if key not in ('note', 'first_layer')
    }
    optimizer = getattr(mmprecond.optimizers, meta['optimizer'])(
        model, settings='published', **hyper
    )
    if 'first_layer' in meta['hyper']:
        optimizer.calibrate_first_layer(torch.from_numpy(x).double() for x in data['x'])
    compared = 0
    for step in range(meta['steps']):
        x = torch.from_numpy(data['x'][step]).double()
        loss = squared_error(model(x), torch.from_numpy(data['y'][step]))
        assert loss.item() == pytest.approx(float(golden['loss'][step]), rel=1e-6)
        optimizer.zero_grad()
        loss.backward(create_graph=getattr(optimizer, 'needs_graph', False))
        optimizer.step()
        for name, p in model.named_parameters():
            if f'step{step + 1}/{name}' in golden.files:
                wanted = golden[f'step{step + 1}/{name}']
                error = np.abs(p.detach().numpy() - wanted).max()
                assert error <= 1e-6 * max(1, np.abs(wanted).max()), (name, step)
                compared += 1
    assert compared == 4 * sum(1 for _ in model.parameters())
