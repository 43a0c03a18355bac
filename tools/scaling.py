raise SystemExit('moved to tools/analysis_tools/scaling.py')
