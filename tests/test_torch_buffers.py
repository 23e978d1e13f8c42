"""Memory of outputs that is kept and lent again: never while somebody uses it, never beyond the limit."""

import gc
import os
import threading

import pytest
import torch

from batchnorm.errors import OptionError
from batchnorm.torch import BatchNorm2d, buffers, keep_memory
from batchnorm.torch.buffers import LEAST, empty_like


@pytest.fixture(autouse=True)
def _alone():
    """Nothing waits when a test begins."""
    before = keep_memory(0)
    keep_memory(before or 1 << 28)
    yield
    keep_memory(before)


def kept():
    return buffers._STORE.bytes


def test_an_output_that_is_gone_is_lent_again():
    x = torch.randn(1 << 20)
    first = empty_like(x)
    address = first.data_ptr()
    assert empty_like(x).data_ptr() != address
    del first
    again = empty_like(x), empty_like(x)
    assert address in [v.data_ptr() for v in again]


def test_memory_is_not_lent_while_a_view_or_an_array_is_on_it():
    x = torch.randn(1 << 20)
    y = empty_like(x)
    address, view = y.data_ptr(), y[5:]
    del y
    array = view.numpy()
    del view
    gc.collect()
    assert empty_like(x).data_ptr() != address
    del array
    assert address in [v.data_ptr() for v in (empty_like(x), empty_like(x))]


def test_memory_is_not_lent_while_its_storage_is_held():
    x = torch.randn(1 << 20)
    y = empty_like(x)
    address, storage = y.data_ptr(), y.untyped_storage()
    del y
    assert empty_like(x).data_ptr() != address
    del storage
    assert address in [v.data_ptr() for v in (empty_like(x), empty_like(x))]


def test_memory_that_went_to_another_process_is_not_lent_again():
    x = torch.randn(1 << 20)
    y = empty_like(x).copy_(x)
    receiver = y.share_memory_().untyped_storage()._share_filename_cpu_()
    del y
    other = torch.UntypedStorage._new_shared_filename_cpu(*receiver)
    empty_like(x).fill_(7.0)
    assert torch.equal(torch.empty(0).set_(other, 0, x.shape, x.stride()), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_lent_tensor_is_as_any_other(dtype):
    x = torch.randn(4, 64, 80, 80).to(dtype).contiguous(memory_format=torch.channels_last)
    y = empty_like(x)
    assert (y.shape, y.stride(), y.dtype, y.is_leaf, y._base) == (x.shape, x.stride(), x.dtype, True, None)
    assert y.data_ptr() % 64 == 0
    y.copy_(x)
    assert torch.equal(y.clone(), x)
    y.relu_()
    assert torch.equal(y, x.relu())


def test_the_limit_holds_and_old_sizes_go_first():
    keep_memory(4 * LEAST)
    old, new = torch.empty(LEAST // 2), torch.empty(LEAST // 4)
    held = [empty_like(old), empty_like(new)]
    del held
    assert kept() == 3 * LEAST
    held = [empty_like(new) for _ in range(3)]
    assert kept() == 3 * LEAST
    held += [empty_like(old), empty_like(new), empty_like(new)]
    assert kept() == 4 * LEAST
    del held
    keep_memory(0)
    assert kept() == 0


def test_small_outputs_are_not_kept():
    empty_like(torch.empty(16))
    assert kept() == 0


def test_an_output_can_be_resized():
    y = empty_like(torch.empty(LEAST))
    y.resize_(2 * LEAST).fill_(1.0)
    del y
    assert empty_like(torch.empty(LEAST)).fill_(2.0).sum() == 2.0 * LEAST


def test_a_limit_below_zero_is_refused():
    with pytest.raises(OptionError, match="0 or more, got -1"):
        keep_memory(-1)


def test_gradients_of_steps_in_lent_memory_are_those_in_new():
    layer, x = BatchNorm2d(64, activation="relu"), torch.randn(8, 64, 24, 24, requires_grad=True)
    dy = torch.randn_like(x)

    def step():
        y = layer(x)
        (dx,) = torch.autograd.grad(y, x, dy)
        return y.detach().clone(), dx.clone()

    lent = [step() for _ in range(3)]
    keep_memory(0)
    new = step()
    assert all(torch.equal(a, b) for pair in lent for a, b in zip(pair, new, strict=True))


def test_several_threads_never_share_a_block():
    x, wrong = torch.empty(LEAST // 4), []

    def work(number):
        for _ in range(200):
            y = empty_like(x).fill_(number)
            if not bool((y == number).all()):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_who_asks_while_memory_is_given_out_gets_other_memory():
    """A finalizer may run a layer in the middle of it, in the same thread."""
    x = torch.empty(LEAST)
    y = empty_like(x).fill_(1.0)
    storage = y.untyped_storage()
    turn = buffers.turn_of(storage)
    with buffers._STORE.lock:
        assert empty_like(x).fill_(2.0).data_ptr() != y.data_ptr()
        assert buffers.once_more(storage, turn, x.dtype, x.shape, x.stride()) is None
    assert torch.equal(buffers.once_more(storage, turn, x.dtype, x.shape, x.stride()), y)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_forked_process_writes_into_memory_of_its_own():
    y = empty_like(torch.empty(LEAST)).fill_(1.0)
    del y
    child = os.fork()
    if child == 0:
        empty_like(torch.empty(LEAST)).fill_(2.0)
        os._exit(0)
    os.waitpid(child, 0)
    assert bool((empty_like(torch.empty(LEAST)) == 1.0).all())
