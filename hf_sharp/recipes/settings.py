"""Which options a method takes, for recipes that hand the command line on."""

from hf_sharp._presets.names import options_of as options_of
