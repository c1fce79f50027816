"""The lesson's GoogLeNet for 32x32 images: convolutions with bias, no batch norm."""

import torch
from torch import nn

# The paper's table 1: 1x1, 3x3 reduce, 3x3, 5x5 reduce, 5x5, pool projection.
BLOCKS = {
    "a3": (64, 96, 128, 16, 32, 32),
    "b3": (128, 128, 192, 32, 96, 64),
    "a4": (192, 96, 208, 16, 48, 64),
    "b4": (160, 112, 224, 24, 64, 64),
    "c4": (128, 128, 256, 24, 64, 64),
    "d4": (112, 144, 288, 32, 64, 64),
    "e4": (256, 160, 320, 32, 128, 128),
    "a5": (256, 160, 320, 32, 128, 128),
    "b5": (384, 192, 384, 48, 128, 128),
}
POOLED_AFTER = ("b3", "e4")
STEM_WIDTH = 192
PARAMETERS = 5_864_762


def conv(inputs, outputs, kernel):
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2), nn.ReLU(inplace=True)


class Inception(nn.Module):
    def __init__(self, inputs, n1x1, reduce3x3, n3x3, reduce5x5, n5x5, pool_proj):
        super().__init__()
        self.branch1 = nn.Sequential(*conv(inputs, n1x1, 1))
        self.branch2 = nn.Sequential(*conv(inputs, reduce3x3, 1), *conv(reduce3x3, n3x3, 3))
        self.branch3 = nn.Sequential(*conv(inputs, reduce5x5, 1), *conv(reduce5x5, n5x5, 5))
        self.branch4 = nn.Sequential(nn.MaxPool2d(3, stride=1, padding=1), *conv(inputs, pool_proj, 1))
        self.outputs = n1x1 + n3x3 + n5x5 + pool_proj

    def forward(self, x):
        return torch.cat([self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x)], dim=1)


class LessonGoogLeNet(nn.Module):
    def __init__(self, classes=10, dropout=0.4):
        super().__init__()
        self.pre_layers = nn.Sequential(*conv(3, STEM_WIDTH, 3))
        width = STEM_WIDTH
        for name, widths in BLOCKS.items():
            block = Inception(width, *widths)
            self.add_module(name, block)
            width = block.outputs
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(width, classes)
        self.initialise()

    def initialise(self):
        """As the lesson: biases of convolutions keep PyTorch's default."""
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.fc.bias)

    def forward(self, x, observe=lambda name, activation: None):
        """`observe` sees the output of every stage, for comparisons at depth."""
        x = self.pre_layers(x)
        observe("pre_layers", x)
        for name in BLOCKS:
            x = getattr(self, name)(x)
            observe(name, x)
            if name in POOLED_AFTER:
                x = self.maxpool(x)
                observe(f"{name}.maxpool", x)
        x = torch.flatten(self.avgpool(x), 1)
        observe("avgpool", x)
        return self.fc(self.dropout(x))


if __name__ == "__main__":
    model = LessonGoogLeNet()
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS
    for name, tensor in model.state_dict().items():
        print(f"{name:24} {list(tensor.shape)}")
