// From a click to the frame that shows what it did, in the page's own clock; and what axe finds.
import { createRequire } from 'node:module';
import { readFileSync } from 'node:fs';
import type { Locator } from '@playwright/test';
import type { Lab } from './djinn';

/**
 * Milliseconds from the pointer event of a click to the end of the first frame in which `selector`
 * matches something: handlers, style, layout and paint of the change, and nothing of the test's own.
 */
export async function clickToPaint(
  page: Lab,
  target: Locator,
  selector: string
): Promise<number> {
  await page.evaluate(wanted => {
    const holder = window as unknown as { djinnPainted: Promise<number> };
    holder.djinnPainted = new Promise<number>((resolve, reject) => {
      if (document.querySelector(wanted)) {
        reject(new Error(`${wanted} is there before the click`));
        return;
      }
      const began = (event: Event): void => {
        const look = (): void => {
          if (!document.querySelector(wanted)) {
            requestAnimationFrame(look);
            return;
          }
          // a message is handled after the frame that is being made has been painted
          const painted = new MessageChannel();
          painted.port1.onmessage = () =>
            resolve(performance.now() - event.timeStamp);
          painted.port2.postMessage(null);
        };
        requestAnimationFrame(look);
      };
      document.addEventListener('pointerdown', began, {
        capture: true,
        once: true
      });
    });
    holder.djinnPainted.catch(() => undefined);
  }, selector);
  await target.click();
  return page.evaluate(
    () => (window as unknown as { djinnPainted: Promise<number> }).djinnPainted
  );
}

interface Violation {
  id: string;
  impact: string | null;
  help: string;
  nodes: { html: string; failureSummary?: string }[];
}

const AXE = readFileSync(
  createRequire(__filename).resolve('axe-core/axe.min.js'),
  'utf-8'
);

/** What axe calls serious or critical inside `selector`, one line each, with the element. */
export async function seriousFindings(
  page: Lab,
  selector: string
): Promise<string[]> {
  await page.evaluate(AXE);
  const violations = await page.evaluate(async inside => {
    const axe = (window as unknown as { axe: { run: CallableFunction } }).axe;
    const result = await axe.run(inside, { resultTypes: ['violations'] });
    return result.violations as Violation[];
  }, selector);
  return violations
    .filter(found => ['serious', 'critical'].includes(found.impact ?? ''))
    .flatMap(found =>
      found.nodes.map(
        node => `${found.id}: ${found.help}: ${node.html.slice(0, 160)}`
      )
    );
}
