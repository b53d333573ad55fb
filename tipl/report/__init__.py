"""The report stage: read results (`results`), judge (`estimates`, `verdict`), draw (`plots`, `page`), `write`."""

from tipl.report.write import write_report

__all__ = ["write_report"]
