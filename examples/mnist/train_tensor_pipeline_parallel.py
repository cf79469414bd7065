"""MNIST with tensor and pipeline parallelism: fc1 is split over tensor-parallel ranks, the network over two stages.

Written for GPUs. Started by ``modelparallel run --device cpu`` (the launcher's choice where there is no GPU), the CUDA
calls below are mapped to the CPU. Start it with launch_tensor_pipeline_parallel.py.
"""

import argparse
import os

import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.optim as optim
from torchnet.dataset import SplitDataset
from torchvision import datasets, transforms

import smdistributed.modelparallel.torch as smp


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, 1)
        self.conv2 = nn.Conv2d(32, 64, 3, 1)
        self.fc1 = nn.Linear(9216, 128)
        self.fc2 = nn.Linear(128, 10)

    def forward(self, x):
        x = F.relu(self.conv1(x))
        x = F.relu(self.conv2(x))
        x = torch.flatten(F.max_pool2d(x, 2), 1)
        x = F.relu(self.fc1(x))
        return F.log_softmax(self.fc2(x), 1)


# The body runs once per microbatch. Return what is needed outside.
@smp.step
def train_step(model, data, target):
    output = model(data)
    loss = F.nll_loss(output, target, reduction="mean")
    model.backward(loss)
    return output, loss


@smp.step
def test_step(model, data, target):
    return model(data).argmax(dim=1).eq(target).sum()


def train(model, device, train_loader, optimizer, max_steps):
    model.train()
    for step, (data, target) in enumerate(train_loader):
        if step == max_steps:
            break
        # Inputs go to the device of this process, which set_device chose below.
        data, target = data.to(device), target.to(device)
        optimizer.zero_grad()
        # loss_mb is a StepOutput: one loss per microbatch.
        _, loss_mb = train_step(model, data, target)
        loss = loss_mb.reduce_mean()
        optimizer.step()
        if step % 10 == 0 and smp.rank() == 0:
            print(f"step {step:4d}  loss {loss.item():.4f}", flush=True)


def evaluate(model, device, test_loader):
    """Each data-parallel rank counts on its shard; the sum over them is the whole test set's."""
    model.eval()
    counts = torch.zeros(2, device=device)
    with torch.no_grad():
        for data, target in test_loader:
            data, target = data.to(device), target.to(device)
            correct = test_step(model, data, target).reduce_sum()
            counts += torch.tensor([correct.item(), len(target)], device=device)
    torch.distributed.all_reduce(counts, group=smp.get_dp_process_group())
    return 100.0 * counts[0].item() / counts[1].item()


def shard(dataset):
    """This data-parallel rank's part of the dataset."""
    if smp.dp_size() > 1:
        partitions = {f"{i}": 1 / smp.dp_size() for i in range(smp.dp_size())}
        dataset = SplitDataset(dataset, partitions=partitions)
        dataset.select(f"{smp.dp_rank()}")
    return dataset


def load(root, is_train):
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))])
    return datasets.MNIST(root, train=is_train, download=False, transform=transform)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch-size", type=int, default=64, help="of each data-parallel rank")
    parser.add_argument("--lr", type=float, default=4.0)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--max-steps", type=int, default=None, help="end each epoch after so many steps")
    parser.add_argument(
        "--seed", type=int, default=None, help="of the initial weights; without it they differ each time"
    )
    parser.add_argument("--data", default=os.environ.get("SM_CHANNEL_TRAINING", "../data"))
    args, _ = parser.parse_known_args()

    smp.init()
    if args.seed is not None:
        torch.manual_seed(args.seed)

    # The GPU of this process. Input tensors go to this device.
    torch.cuda.set_device(smp.local_rank())
    device = torch.device("cuda")

    # One process of a host looks at the files first; with a download they would be written once.
    if smp.local_rank() == 0:
        load(args.data, is_train=True)
    smp.barrier()
    # drop_last: every batch divides by the number of microbatches.
    train_loader = torch.utils.data.DataLoader(
        shard(load(args.data, is_train=True)), batch_size=args.batch_size, drop_last=True
    )
    test_loader = torch.utils.data.DataLoader(shard(load(args.data, is_train=False)), batch_size=args.batch_size)

    model = Net()
    # Tensor parallelism for fc1 alone.
    smp.set_tensor_parallelism(model.fc1, True)
    # From here on the wrapped model takes the place of the plain one; the first step partitions it over the stages.
    model = smp.DistributedModel(model)

    optimizer = optim.Adadelta(model.parameters(), lr=args.lr)
    optimizer = smp.DistributedOptimizer(optimizer)

    for _ in range(args.epochs):
        train(model, device, train_loader, optimizer, args.max_steps)
    accuracy = evaluate(model, device, test_loader)
    if smp.rank() == 0:
        print(f"test accuracy {accuracy:.1f}%", flush=True)


if __name__ == "__main__":
    main()
