"""A command that tests start in several processes, with the environment that ``torchrun`` gives them."""

from hone_fpsattention import cli

if __name__ == "__main__":
    cli.main()
