"""Boards that take a program through their bootloader: ESP32 (esptool), UF2 volumes, MCUboot over SMP, Jetson (NVIDIA's flasher)."""
