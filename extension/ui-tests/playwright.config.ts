// Chromium of the distribution against the lab that `python -m scripts.ui_tests` started; one
// worker, since all tests share one kernel server and two cores. The limits are against what hangs,
// on a machine that others use too.
import { defineConfig } from '@playwright/test';

const report = process.env.DJINN_UI_REPORT;

export default defineConfig({
  testDir: './tests',
  outputDir: './test-results',
  timeout: 600_000,
  expect: { timeout: 120_000 },
  workers: 1,
  retries: 0,
  forbidOnly: true,
  reporter: report ? [['list'], ['junit', { outputFile: report }]] : [['list']],
  use: {
    baseURL: process.env.TARGET_URL,
    viewport: { width: 1600, height: 1000 },
    actionTimeout: 120_000,
    screenshot: 'only-on-failure',
    trace: 'off',
    // Playwright's own ffmpeg is not there, and nothing is fetched
    video: 'off',
    launchOptions: {
      executablePath: process.env.DJINN_CHROMIUM,
      args: (process.env.DJINN_CHROMIUM_FLAGS ?? '').split(' ').filter(flag => flag !== '')
    }
  }
});
