"""`tandem policies`: the scheduling policies that ship."""

from __future__ import annotations

from analysis.cli import options
from analysis.cli.options import Commands
from analysis.cli.output import print_result

app = Commands()


@app.command()
def policies(as_json: options.AsJson = False) -> None:
    """List the scheduling policies that ship: rule, source, parameters and their defaults."""
    from analysis.report.policy_list import list_policies, policy_list_tables

    print_result(list_policies(), as_json, policy_list_tables)
