raise SystemExit('moved to tools/analysis_tools/compare_runs.py')
