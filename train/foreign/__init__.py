"""Adapters that were made with PEFT elsewhere, turned into adapter folders."""
