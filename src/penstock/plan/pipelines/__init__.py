"""Stages of a network on ranks of their own."""
