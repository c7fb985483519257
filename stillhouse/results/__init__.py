"""Turn the files of a sweep into tables, statistics, figures, and one report page.

Reading order:
    provenance, table           run directories -> one pandas frame
    stats, comparisons, answer  means, intervals, paired comparisons, and what they say
    format, summary             numbers as text, the table of arms, notes on missing or mixed data
    curves, plots, figures      metrics over steps, and how they are drawn
    section, analyses/          one file per section of the report
    report                      the page and everything beside it

The rest of the package imports `table.load` and `report.write_report`, `studies/` and `tools/` also
`stats` and `analyses.preflight`. Nothing here needs torch.
"""
