"""An optimizer whose weights are sharded over ranks (FSDP2, on a CPU) is saved whole and continues unchanged.

The Trainer saves and loads it with the functions of accelerate that are called here.
"""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import os
import sys
from pathlib import Path
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils import load_fsdp_optimizer, save_fsdp_optimizer
from atomtune.train.checkpoint.state import has_optimizer, refuse_programs

folder, ranks = Path(sys.argv[1]), int(sys.argv[2])
distributed.init_process_group("gloo")
mesh = init_device_mesh("cpu", (ranks,))

def made():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
    model[0].bias.requires_grad_(False)  # as a base under an adapter
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, torch.optim.AdamW([w for w in model.parameters() if w.requires_grad], lr=0.1)

def step(model, optimizer):
    model(torch.ones(2, 6)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()

whole, optimizer = made()
for _ in range(3):
    step(whole, optimizer)
weights = [weight.full_tensor().detach().clone() for weight in whole.parameters()]
plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type="FULL_STATE_DICT")
accelerator = Accelerator(cpu=True)
save_fsdp_optimizer(plugin, accelerator, optimizer, whole, folder)
accelerator.wait_for_everyone()
step(whole, optimizer)

again, other = made()
with torch.no_grad():
    for weight, value in zip(again.parameters(), weights):
        weight.copy_(torch.distributed.tensor.distribute_tensor(value, mesh, weight.placements))
assert has_optimizer(folder)
refuse_programs(folder)
load_fsdp_optimizer(plugin, accelerator, other, again, folder)
step(again, other)
for one, two in zip(whole.parameters(), again.parameters()):
    assert torch.equal(one.full_tensor(), two.full_tensor())
distributed.barrier()
os._exit(0)  # the threads of gloo may outlive the interpreter otherwise
"""


@pytest.mark.slow
def test_a_sharded_optimizer_resumes_bit_identically(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", str(script), str(tmp_path), "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(launcher, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "optimizer.bin").is_file()
