"""Batch normalization for PyTorch."""

from batchnorm.torch.accumulation import accumulate as accumulate
from batchnorm.torch.buffers import keep_memory as keep_memory
from batchnorm.torch.choice import force as force
from batchnorm.torch.domains import add_domains as add_domains
from batchnorm.torch.domains import domain as domain
from batchnorm.torch.explaining import explain as explain
from batchnorm.torch.freezing import freeze as freeze
from batchnorm.torch.freezing import unfreeze as unfreeze
from batchnorm.torch.fusing import convert as convert
from batchnorm.torch.layers import BatchNorm1d as BatchNorm1d
from batchnorm.torch.layers import BatchNorm2d as BatchNorm2d
from batchnorm.torch.layers import BatchNorm3d as BatchNorm3d
from batchnorm.torch.monitoring import Monitor as Monitor
from batchnorm.torch.options import RenormSchedule as RenormSchedule
from batchnorm.torch.parameters import param_groups as param_groups
from batchnorm.torch.recompute import recompute as recompute
from batchnorm.torch.surgery import revert as revert
from batchnorm.torch.synchronizing import sync as sync
from batchnorm.torch.synchronizing import unsync as unsync
