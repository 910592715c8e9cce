"""Hyper-cleaning: learn a weight for each training sample, from the loss on a few clean ones.

Half of the training labels of scikit-learn's digits are replaced by random ones. The weights of the corrupted samples fall.
"""

from functools import partial

import torch
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, Adam

import mlopt

torch.manual_seed(0)
images, digits = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
order = torch.randperm(len(images))
inputs, labels = images[order].float() / 16, digits[order]
train, valid, test = slice(0, 1000), slice(1000, 1300), slice(1300, None)

corrupted = torch.rand(1000) < 0.5
noisy = torch.where(corrupted, torch.randint(10, (1000,)), labels[train])
is_clean = noisy == labels[train]  # a random label may be the right one


class SampleWeights(nn.Module):
    def __init__(self, count):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(count))

    def forward(self, index):
        return self.logits[index].sigmoid()


def training_loss(classifier, batch, *, weights):  # own module, batch, then the levels it depends on, by name
    inputs, labels, index = batch
    losses = cross_entropy(classifier(inputs), labels, reduction="none")
    return (weights(index) * losses).mean() + 1e-3 * sum(p.square().sum() for p in classifier.parameters())


def validation_loss(weights, batch, *, classifier):
    inputs, labels = batch
    return cross_entropy(classifier(inputs), labels)


def network():
    return nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))


def accuracy(classifier):
    return (classifier(inputs[test]).argmax(1) == labels[test]).float().mean().item()


def main():
    weights, classifier = SampleWeights(1000), network()
    problem = mlopt.Problem(
        mlopt.Level(
            "weights",
            weights,
            validation_loss,
            data=[(inputs[valid], labels[valid])],
            optimizer=partial(Adam, lr=0.1),
        ),
        mlopt.Level(
            "classifier",
            classifier,
            training_loss,
            data=[(inputs[train], noisy, torch.arange(1000))],
            optimizer=partial(SGD, lr=0.5, momentum=0.9),
            steps=10,
            estimator=mlopt.ConjugateGradient(iterations=10, damping=2e-2),
        ),
    )
    print(problem)
    solution = mlopt.solve(problem, steps=200)
    print(solution.reports["classifier"])

    plain = network()
    optimizer = SGD(plain.parameters(), lr=0.5, momentum=0.9)
    for _ in range(2_000):
        optimizer.zero_grad()
        loss = cross_entropy(plain(inputs[train]), noisy) + 1e-3 * sum(p.square().sum() for p in plain.parameters())
        loss.backward()
        optimizer.step()

    area = roc_auc_score(is_clean, weights.logits.detach())
    print(f"area under ROC of 'is clean', by weight: {area:.3f}")
    print(f"accuracy on the test digits: {accuracy(plain):.3f} trained on all, {accuracy(classifier):.3f} reweighted")
    return area, accuracy(plain), accuracy(classifier)


if __name__ == "__main__":
    main()
