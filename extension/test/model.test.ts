import assert from 'node:assert/strict';
import { describe, it } from 'node:test';
import {
  Newest,
  announcement,
  bars,
  bytesText,
  isSnapshot,
  ladder,
  ofText,
  rowName,
  statusText,
  stillAsked,
  tree
} from '../src/model';
import { breakpoint, english, node, session, snapshot } from './briefs';

describe('the newest snapshot', () => {
  it('is kept, and an older one dropped', () => {
    const newest = new Newest();
    assert.ok(newest.take(snapshot({ rev: 7 })));

    assert.ok(!newest.take(snapshot({ rev: 6 })));
    assert.ok(!newest.take(snapshot({ rev: 7, address: 'another' })));

    assert.equal(newest.snapshot?.rev, 7);
    assert.equal(newest.snapshot?.address, '127.0.0.1:5556');
  });

  it('of a restarted kernel counts, although its numbers begin anew', () => {
    const newest = new Newest();
    newest.take(snapshot({ rev: 90, kernel: 'before' }));

    assert.ok(newest.take(snapshot({ rev: 1, kernel: 'after' })));
    assert.equal(newest.snapshot?.kernel, 'after');
  });

  it('is told from other data', () => {
    assert.ok(isSnapshot(snapshot()));
    assert.ok(!isSnapshot({ rev: 1 }));
    assert.ok(!isSnapshot(null));
    assert.ok(!isSnapshot('snapshot'));
  });
});

describe('the ladder', () => {
  it('has a row per layer, and shows where the session stands', () => {
    const rows = ladder(snapshot());

    assert.equal(rows.length, 6);
    assert.deepEqual(
      rows.map(row => row.executed),
      [true, true, true, true, false, false]
    );
    assert.deepEqual(
      rows.filter(row => row.here).map(row => row.layer),
      [3]
    );
    assert.equal(rows[3].mark, 'on');
  });

  it('is empty without a model', () => {
    assert.deepEqual(ladder(snapshot({ model: null })), []);
  });

  it('marks no layer as the place of a session that runs', () => {
    const running = snapshot({ sessions: [session({ status: 'running' })] });

    assert.ok(ladder(running).every(row => !row.here));
  });

  it('shows breakpoints of runs to come, while no session goes on', () => {
    const pending = [
      {
        location: 'layers.2.output',
        layer: 2,
        when: 'any',
        condition: null
      } as const
    ];
    const finished = snapshot({
      sessions: [session({ status: 'finished', layer: null })],
      pending
    });

    assert.equal(ladder(finished)[2].mark, 'on');
    assert.ok(ladder(finished)[2].pending);
    assert.equal(ladder(finished)[3].mark, 'none');
    assert.equal(ladder(snapshot({ pending }))[2].mark, 'none');
  });

  it('tells a breakpoint that is off, and one inside a layer', () => {
    const rows = ladder(
      snapshot({
        breakpoints: [
          breakpoint({ enabled: false }),
          breakpoint({ id: 2, location: 'layers.1.mlp.output', layer: 1 })
        ]
      })
    );

    assert.equal(rows[3].mark, 'off');
    assert.equal(rows[1].mark, 'inside');
  });

  it('shows at once what a click asked for, until the kernel does', () => {
    const asked = new Map([
      [2, true],
      [3, false]
    ]);
    const before = ladder(snapshot(), asked);
    assert.equal(before[2].mark, 'on');
    assert.equal(before[3].mark, 'none');
    assert.equal(stillAsked(snapshot(), asked).size, 2);

    const after = snapshot({
      breakpoints: [breakpoint({ location: 'layers.2.output', layer: 2 })]
    });
    assert.equal(stillAsked(after, asked).size, 0);
  });

  it('is named for those who do not see it', () => {
    const rows = ladder(
      snapshot({ breakpoints: [breakpoint({ condition: 'norm > 30' })] })
    );

    assert.equal(
      rowName(rows[3], english),
      'layer 3, breakpoint, if norm > 30, stopped here'
    );
    assert.equal(rowName(rows[2], english), 'layer 2, has run');
    assert.equal(rowName(rows[4], english), 'layer 4');
  });
});

describe('memory', () => {
  it('has units, and the unit once where both sides share it', () => {
    assert.equal(bytesText(0), '0 B');
    assert.equal(bytesText(999), '999 B');
    assert.equal(bytesText(999_999), '1 MB');
    assert.equal(bytesText(12_345_678_901), '12.3 GB');
    assert.equal(ofText(12e9, 40e9, english), '12 of 40 GB');
    assert.equal(ofText(12e6, 40e9, english), '12 MB of 40 GB');
  });

  it('has a bar for each tier there is', () => {
    const found = bars(
      {
        device_used: 1e9,
        device_total: 4e9,
        host_used: 0,
        host_total: 0,
        disk_used: 5e9,
        disk_total: 4e9,
        rows: [],
        swaps: []
      },
      english
    );

    assert.deepEqual(
      found.map(bar => [bar.tier, bar.share]),
      [
        ['device', 0.25],
        ['disk', 1]
      ]
    );
    assert.deepEqual(bars(null, english), []);
  });
});

describe('the status line', () => {
  it('says where the session is stopped and how full the device is', () => {
    const memory = {
      device_used: 12e9,
      device_total: 40e9,
      host_used: 0,
      host_total: 0,
      disk_used: 0,
      disk_total: 0,
      rows: [],
      swaps: []
    };

    assert.equal(
      statusText(snapshot({ memory }), english),
      'stopped at layers.3.output · KV 12 of 40 GB'
    );
  });

  it('says what is wrong instead, when something is', () => {
    assert.equal(
      statusText(snapshot({ connection: 'lost' }), english),
      'Djinn: server lost'
    );
    assert.equal(statusText(null, english), '');
  });

  it('is announced when a session comes to rest, not while it runs', () => {
    const running = snapshot({ sessions: [session({ status: 'running' })] });

    assert.equal(announcement(running, english), '');
    assert.equal(
      announcement(snapshot(), english),
      'stopped at layers.3.output (breakpoint), forward 0'
    );
  });
});

describe('the branch tree', () => {
  it('goes deeper only where it branches', () => {
    const rows = tree([
      node({ number: 0 }),
      node({ number: 1, parent: 0 }),
      node({ number: 2, parent: 1 }),
      node({ number: 3, parent: 1, current: true }),
      node({ number: 4, parent: 3 })
    ]);

    assert.deepEqual(
      rows.map(row => [row.node.number, row.depth]),
      [
        [0, 0],
        [1, 0],
        [2, 1],
        [3, 1],
        [4, 1]
      ]
    );
  });

  it('loses no node whose parent is gone', () => {
    const rows = tree([node({ number: 5, parent: 2 })]);

    assert.deepEqual(
      rows.map(row => row.node.number),
      [5]
    );
  });
});
