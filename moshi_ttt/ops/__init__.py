"""The equations, as pure functions on tensors. No nn.Module, no Moshi."""
