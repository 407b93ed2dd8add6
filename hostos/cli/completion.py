"""hostos completion: what a shell needs to complete our commands."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

VARIABLE = "_HOSTOS_COMPLETE"


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the script that lets a shell complete commands, options, machines and images.

    \b
      bash   echo 'eval "$(hostos completion bash)"' >> ~/.bashrc
      zsh    echo 'eval "$(hostos completion zsh)"' >> ~/.zshrc      (below compinit)
      fish   hostos completion fish > ~/.config/fish/completions/hostos.fish
    """
    from hostos.cli import hostos

    kind = get_completion_class(shell)
    assert kind is not None
    complete = kind(hostos, {}, "hostos", VARIABLE)
    # Not .source(): that runs bash to ask for its version, here and now.
    click.echo(complete.source_template % complete.source_vars())
