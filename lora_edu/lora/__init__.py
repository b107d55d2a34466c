"""The subject: low-rank updates of frozen layers. Works on any `nn.Module`; imports torch only."""
