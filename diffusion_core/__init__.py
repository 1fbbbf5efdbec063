"""The diffusion core: mathematics on tensors. Start with protocols.py."""
